"""The command line: `pixelmill COMMAND …`. A command is one entry of COMMANDS and one file in flows/commands.

Exit codes: 0 all done · 1 failed, or some shards failed · 2 wrong usage or input · 130 interrupted.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version

from cyclopts import App, CycloptsError, MissingArgumentError

from models.errors import PixelmillError

# Name → the file and function that do it, imported when the command is called, and the line for `pixelmill --help`.
COMMANDS = {
    "demo": ("demo:demo", "The whole chain on real photographs that packages ship, offline, in minutes."),
    "ingest": ("ingest:ingest", "Turn a labelled folder, bucket or archive into a versioned data set."),
    "train": ("train:train", "Fine-tune a pretrained model on a data set, export and measure it."),
    "export": ("export:export", "Export a model to ONNX: fp32, fp16 or int8."),
    "evaluate": ("evaluate:evaluate", "Measure a model on a split of a data set."),
    "promote": ("promote:promote", "Make a version the one that NAME@production means."),
    "import": ("adopt:adopt", "Adopt pretrained weights or a foreign ONNX file as a model of the store."),
    "predict": ("predict:predict", "Run a model over a folder or bucket of images; one row per image in a table."),
    "generate": ("generate:generate", "Make images with a generator; as a data set, too."),
    "backfill": ("backfill:backfill", "Predict partition by partition, each in a run of its own; resumable."),
    "pipeline": ("pipeline:pipeline", "From a labelled source to a table: all of these in one go."),
    "query": ("query:query", "Ask the tables with SQL."),
    "neighbours": ("neighbours:neighbours", "The images of a table that are most like one, by embedding."),
    "export-coco": ("export_coco:export_coco", "Write a table of objects, or a data set, as a COCO file."),
    "verify": ("verify:verify", "Check a table: counts, checksums, one row per claimed image."),
    "ls": ("ls:ls", "List what is in the store."),
    "vacuum": ("vacuum:vacuum", "Remove what killed runs and old model versions left behind."),
    "doctor": ("doctor:doctor", "Check store, engines, Prefect and versions, and say how to mend each."),
}


def make_app() -> App:
    """The command line, without any command loaded."""
    app = App(
        name="pixelmill",
        help="Batch computer vision: from folders and buckets of images to Parquet tables, exactly one row per image.",
        version=_version,
        help_format="plaintext",
        suppress_keyboard_interrupt=False,  # main says how to go on
    )
    for name, (function, summary) in COMMANDS.items():
        app.command(f"flows.commands.{function}", name=name, help=summary)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Whatever goes wrong is one line on stderr, never a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = next(iter(arguments), "--help")
    if not name.startswith("-") and name not in COMMANDS:  # cyclopts would import every command to say so
        near = "".join(f"; did you mean {one}?" for one in get_close_matches(name, COMMANDS, n=1))
        return _complain(f"no command {name!r}{near} Commands: {', '.join(COMMANDS)}", 2)
    try:
        return make_app()(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except MissingArgumentError as error:
        missing = error.argument.name if error.argument else "an argument"
        return _complain(f"{name} needs {missing}; see: pixelmill {name} --help", 2)
    except CycloptsError as error:
        return _complain(f"{error} See: pixelmill {name} --help", 2)
    except PixelmillError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted; run the same command again to go on", 130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("PIXELMILL_DEBUG"):
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        return _complain(f"unexpected {what}; please report it (PIXELMILL_DEBUG=1 shows the traceback)", 1)


def _version() -> str:
    try:
        return version("pixelmill")
    except PackageNotFoundError:
        return "not installed: run from a checkout"


def _complain(message: str, exit_code: int) -> int:
    print(f"pixelmill: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
