"""Are the installed packages those that this version was made for?"""

from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

from tasks.doctor.finding import Finding, ok, problem, warning


def check_packages() -> list[Finding]:
    """The packages that every command needs, those of the training extra, and DuckDB's S3 extension."""
    try:
        declared = [Requirement(line) for line in metadata.requires("pixelmill") or ()]
    except metadata.PackageNotFoundError:
        return [warning("packages", "pixelmill runs from a checkout and is not installed", "pip install --editable .")]
    needed = [requirement for requirement in declared if _is_for(requirement, "")]
    training = [r for r in declared if _is_for(r, "train") and not _is_for(r, "")]
    return [check_needed(needed), check_training(training), _extension()]


def check_needed(requirements: Iterable[Requirement]) -> Finding:
    """A problem if one of them is missing, or of a version that does not work."""
    requirements = list(requirements)
    wrong = [said for requirement in requirements if (said := _complaint(requirement))]
    if not wrong:
        return ok("packages", f"all {len(requirements)} are there, in versions that fit")
    fix = " ".join(f"'{r.name}{r.specifier}'" for r in requirements if _complaint(r))
    return problem("packages", "; ".join(wrong), f"pip install {fix}")


def check_training(requirements: Iterable[Requirement]) -> Finding:
    """Whether this installation can train; that it cannot is no fault."""
    requirements = list(requirements)
    installed = [requirement for requirement in requirements if _version(requirement.name)]
    mend = "pip install 'pixelmill[train]'"
    if not installed:
        return ok("training", f"not installed; predict does not need it. For import, train and export: {mend}")
    wrong = [said for requirement in requirements if (said := _complaint(requirement))]
    if wrong:
        return warning("training", "; ".join(wrong), mend)
    return ok("training", f"installed, with torch {_version('torch')}")


def _extension() -> Finding:
    import duckdb

    from tasks.query import enable_s3

    with duckdb.connect() as connection:
        try:
            enable_s3(connection)
        except Exception as error:
            version = _version("duckdb")
            mend = f"pip install duckdb-extension-httpfs=={version}: it must be of DuckDB's very version"
            return problem("query on S3", f"DuckDB {version} cannot load httpfs ({type(error).__name__})", mend)
    return ok("query on S3", f"DuckDB {_version('duckdb')} loads its httpfs extension without a download")


def _is_for(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _complaint(requirement: Requirement) -> str:
    """What is wrong with what is installed; "" if nothing."""
    version = _version(requirement.name)
    if version is None and requirement.name == "onnxruntime":  # its build for GPUs has another name
        version = _version("onnxruntime-gpu")
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is there, {requirement.specifier} is needed"
    return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
