"""Two nodes of a Ray cluster, as processes here: prints its address; a line on stdin powers the second off."""

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": int(sys.argv[1]), "include_dashboard": False})
second = cluster.add_node(num_cpus=int(sys.argv[2]))
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
    print("off", flush=True)
cluster.shutdown()
