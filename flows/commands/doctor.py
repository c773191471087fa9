"""`pixelmill doctor`: is everything right before the night's run?"""

from collections import Counter
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from flows.commands.command import Outcome, command
from models.settings.fields import StoreSettings

WithoutPrefect = Annotated[bool, Parameter(negative="", help="Leave Prefect out, as --direct of other commands does.")]


@command("doctor")
def doctor(store: StoreSettings, *, direct: WithoutPrefect = False) -> Outcome:
    """Check store, put-if-absent, clock, engines, Prefect and versions, and say how to mend each.

    For example:

        pixelmill doctor --store s3://bucket/mill

    One line per check: ok, warning or problem. Exit code 1 when there is a problem.
    A small file is written into the store, and removed again. No secret is shown.
    """
    from flows.doctor import examine

    findings = []
    for finding in examine(store.store, direct):
        print(finding, flush=True)  # as soon as it is known; with --json it goes to stderr
        findings.append(finding)
    counts = Counter(finding.state for finding in findings)
    result = {"problems": counts["problem"], "warnings": counts["warning"], "checks": [asdict(f) for f in findings]}
    plural = "problem" if counts["problem"] == 1 else "problems"
    return Outcome(lambda: result, lambda: None, f"{counts['problem']} {plural}" if counts["problem"] else "")
