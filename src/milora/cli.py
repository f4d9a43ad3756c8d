"""The command line: each verb parses, calls one library function and prints.

Nothing heavy is imported before a verb needs it, so that --help answers at once.
"""

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from milora.errors import ElsewhereError, GateError, UserError
from milora.files import NO_ROOM

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a language model in the directions its weights use least; get a plain LoRA.",
    epilog="Start: milora train --print-default > run.yaml; milora train run.yaml --dry-run",
)


def _at_home(path: str | None) -> str | None:
    return path and os.path.expanduser(path)  # which no shell does after --base=


def _to_make(path: Path | None) -> Path | None:
    """Refuse a folder or file that cannot be written before the work for it is done."""
    if path is not None:
        path = path.expanduser()
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f"{path} cannot be written: {there} is no folder that takes files")
    return path


def _to_write(path: Path | None) -> Path | None:
    """The same of a file."""
    path = _to_make(path)
    if path is not None and path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    return path


def _rank() -> int:
    """Which of the processes this is that a launcher has started."""
    return int(os.environ.get("RANK", "0"))


def _several() -> bool:
    """Whether a launcher has started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@app.callback()
def _check_launched(context: typer.Context) -> None:
    verb = context.invoked_subcommand
    if _several() and verb != "train":
        raise UserError(f"milora {verb} runs in one process: start it without a launcher")


TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]

Base = Annotated[
    str | None, typer.Option(help="The base; default: as recorded.", callback=_at_home)
]


@app.command(epilog="Example: milora train run.yaml training.learning_rate=5e-5 lora.r=16")
def train(
    config: Annotated[Path | None, typer.Argument(help="The configuration, a YAML file.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Override a key.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show data, coverage, memory and time; write nothing."),
    ] = False,
    continue_from: Annotated[
        str | None,
        typer.Option(help="Start from the result of this run (continue.run).", callback=_at_home),
    ] = None,
    print_default: Annotated[
        bool, typer.Option("--print-default", help="Print an annotated configuration.")
    ] = False,
) -> None:
    """Decompose, check, train, export, evaluate."""
    from milora.config import DEFAULT, load_config

    if print_default:
        typer.echo(DEFAULT, nl=False)
        return
    if config is None:
        raise UserError("give a configuration: milora train run.yaml (or --print-default)")
    earlier = [f"continue.run={json.dumps(continue_from)}"] if continue_from else []
    settings = load_config(config, [*(overrides or []), *earlier])
    _quiet()
    from milora.files import write_text
    from milora.gates import Verdict
    from milora.progress import Progress
    from milora.report import report
    from milora.train import train as run_training

    with Progress(heard=_rank() == 0) as progress:
        record = run_training(
            **settings.model_dump(), resume=resume, dry_run=dry_run, progress=progress
        )
    if not record:  # another process goes on
        return
    if dry_run:
        _print_plan(record)
        return
    folder = Path(settings.output_dir)
    if record["state"] != "done":
        from milora.processes import alone

        alone(folder)
        return
    _print_scores(json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
    result = folder / ("adapter" if (folder / "adapter").exists() else "model")
    write_text(folder / "report.html", report(folder))
    typer.echo(f"\nThe result: {result}, and {folder / 'report.html'}")
    _tell_gates([Verdict(**one) for one in record["gates"]])


@app.command(epilog="Example: milora history runs/march")
def history(
    run: Annotated[Path, typer.Argument(help="The last run of the chain.")],
) -> None:
    """The runs that led to this one, with their gates and scores, and which of them to serve."""
    from milora.compare_page import Table
    from milora.lineage import chain, current
    from milora.lineage import history as table

    links = chain(run)
    _print_table(Table(*table(links)))
    released = current(links)
    if released is None:
        typer.echo("current release: none, since no run of the chain finished with its gates")
        return
    result = "adapter" if (released.run / "adapter").exists() else "model"
    typer.echo(f"current release: {released.run / result}")


@app.command(epilog="Example: milora init run.yaml lora.r=64   (then any run of rank up to 64)")
def init(
    config: Annotated[Path, typer.Argument(help="The configuration of the run to come.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Override a key.")
    ] = None,
) -> None:
    """Only decompose, into the store that train reads; continues by itself."""
    from milora.config import load_config

    settings = load_config(config, overrides or [])
    if settings.continue_.run:
        raise UserError(
            "continue.run: the components of a run that continues another are not those of the "
            "base: leave them to milora train"
        )
    _quiet()
    from milora.progress import Progress, duration
    from milora.store import Store, decompose_checkpoint

    with Progress() as progress:
        asked = settings.model_dump(
            include={"model", "method", "lora", "seed", "dtype", "trust_remote_code"}
        )
        milora = settings.model_dump()["milora"]
        quantised = bool(settings.quantization or milora["factors_from"])
        asked["model"] = milora["factors_from"] or asked["model"]
        done = decompose_checkpoint(
            **asked,
            quantised=quantised,
            ranked=milora["rank"],
            protect=milora["protect"],
            watched=milora["interference"]["top"],
            store=Store(say=progress.say),
            progress=progress,
        )
    typer.echo(
        f"{done['weights']} weights: {done['made']} decomposed, {done['found']} were in the store; "
        f"worst residual {done['residual']:.1e}; {duration(done['seconds'])}\n"
        f"{done['folder']}: {done['bytes'] / 1e6:.0f} MB"
    )


@app.command(epilog="Example: milora estimate run.yaml --processes 8 --sharded")
def estimate(
    config: Annotated[Path, typer.Argument(help="The configuration of the run to come.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Override a key.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="With a device each.")] = 1,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Weights are shared out, as by FSDP or ZeRO-3.")
    ] = False,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="Reached in training by a device that is not this machine's."),
    ] = None,
) -> None:
    """Memory, time and disk that a run will need; reads no weight and starts nothing."""
    from milora.config import load_config

    settings = load_config(config, overrides or [])
    if sharded and processes == 1:
        raise UserError("--sharded needs --processes of 2 or more to share out among")
    _quiet()
    from milora.estimate import estimate as run_estimate
    from milora.estimate import lines

    speed = None if tflops is None else tflops * 1e12
    found = run_estimate(**settings.model_dump(), processes=processes, sharded=sharded, speed=speed)
    for line in lines(found):
        typer.echo(line)


@app.command("inspect", epilog="Example: milora inspect smollm2-135m --rank 32 --html spectra.html")
def look(
    model: Annotated[str, typer.Argument(help="A model as in `model:`, or a run folder.")],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="What a minor part is measured at.", show_default="32"),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures.", callback=_to_write)
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page.", callback=_to_write)] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Spectra of a model and where to begin; of a run, its interference by layer."""
    if (Path(model) / "run.json").exists():
        if rank or json_file or html:
            raise UserError(
                "--rank, --json and --html are of a model: the figures of a run are in its "
                "run.json and report.html"
            )
        _print_interference(Path(model))
        return
    _quiet()
    from rich.console import Console

    from milora.files import write_json, write_text
    from milora.inspect_page import EXPLAINED, advice_lines, kinds_table, page
    from milora.inspection import inspect_model
    from milora.progress import Progress
    from milora.store import Store

    with Progress() as progress:
        store = Store(say=progress.say, optional=True)
        found = inspect_model(model, rank or 32, store, progress, trust_remote_code)
    console = Console(highlight=False)
    _print_table(kinds_table(found, narrow=console.width < 130))
    console.print(EXPLAINED[0], style="dim")
    console.print("\nWhere to begin:")
    for line in advice_lines(found):
        console.print(f"  {line}", markup=False)
    for reason in found["advice"]["because"]:
        console.print(f"- {reason}", markup=False)
    if json_file:
        write_json(json_file, found)
    if html:
        write_text(html, page(found))


def _print_interference(run: Path) -> None:
    from milora.compare_page import Table
    from milora.files import read_record

    found = read_record(run / "run.json").get("interference")
    if not found:
        raise UserError(
            f"{run} has no interference: the run is not finished, has no adapter, or has "
            "milora.interference.top 0"
        )
    rows = [
        [name, str(one["k"]), "yes" if one["protected"] else "", f"{one['left']:.2e}",
         f"{one['right']:.2e}", f"{one['size']:.4f}",
         "–" if one["minor"] is None else f"{one['minor']:.3f}"]
        for name, one in found["layers"].items()
    ]  # fmt: skip
    head = ["weight", "k", "held", "left", "right", "‖ΔW‖/‖W‖", "minor"]
    _print_table(Table(head, rows))
    typer.echo(f"largest {found['max']:.2e} ({found['module']}), mean {found['mean']:.2e}")


def _print_table(table: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*table.head, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    _print_whole(drawn)


def _print_whole(drawn: Any) -> None:
    """A table with all its figures: in a file as wide as it is, on a terminal folded."""
    from rich.console import Console

    console = Console(highlight=False)
    for column in drawn.columns:
        column.overflow = "fold"  # rich cuts words that are too long, exponents among them
    if not console.is_terminal:
        wide = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(drawn, options=wide).maximum)
    console.print(drawn)


@app.command("eval", epilog="Example: milora eval runs/first --tasks data/test.jsonl --limit 100")
def evaluate(
    source: Annotated[
        Path, typer.Argument(help="A run folder, an adapter made by milora, or a model.")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated data files or names of the run's tasks; default: those."
        ),
    ] = "",
    knowledge: Annotated[
        str, typer.Option(help="Comma-separated general texts, .txt or .jsonl.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Rows per task.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The JSON file to write; default: evaluation.json of the run.", callback=_to_write
        ),
    ] = None,
    all_tasks: Annotated[
        bool,
        typer.Option(
            "--all-tasks",
            help="Every run of the chain on every task of it, and what "
            "updates did to earlier tasks.",
        ),
    ] = False,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Base against tuned: accuracy, format failures, loss, and knowledge kept.

    What a run has been asked before is not asked again. New tasks are added to the run's
    evaluation.json, where its report and gates find them, unless --limit makes them a trial.
    """
    _quiet()
    from milora.evaluate import asked_task, check_lengths, check_task, evaluate_all, load_task
    from milora.files import read_json, read_record
    from milora.forms import answers_apart
    from milora.harness import HarnessTask
    from milora.knowledge import check_unseen, general_texts
    from milora.logits import Pair
    from milora.material import asked_in, trained_questions
    from milora.pretrained import load_pretrained, positions
    from milora.progress import Progress
    from milora.verify import MERGED, open_run
    from milora.vision import image_tokens

    if all_tasks:
        if tasks or knowledge:
            raise UserError("--all-tasks are those of the chain: leave out --tasks and --knowledge")
        _evaluate_chain(source, limit, out, base, trust_remote_code)
        return
    made, run, columns = source / "milora.json", dict[str, Any](), dict[str, str]()
    if made.exists():
        is_model = read_json(made).get("format") == MERGED
    else:
        is_model = not (source / "run.json").exists()
    if is_model:
        if base:
            raise UserError(f"--base: {source} is a model, with nothing beneath it: leave it out")
        # A plain model has nothing to be compared with: base and tuned are the same.
        asked: dict[str, Any] = {
            "tasks": [],
            "knowledge": "default",
            "chunks": 16,
            "batch_size": 16,
        }
        loaded = load_pretrained(str(source), trust_remote_code=trust_remote_code)
        pair, reader = Pair(loaded.model, headless=loaded.headless), loaded.reader
    else:
        pair, reader, configuration = open_run(source, trust_remote_code, base)
        asked, columns = configuration["evaluate"], configuration["data"]["columns"]
        run = read_record(source / "run.json") if (source / "run.json").exists() else {}
    of_run, pictures = asked["tasks"], bool(image_tokens(reader))
    chosen = [asked_task(words, of_run) for words in _parts(tasks)] or of_run
    loaded_tasks = [load_task(task, limit, pictures, columns) for task in chosen]
    names = [task.name for task in loaded_tasks]
    if len(set(names)) < len(names):
        raise UserError(f"--tasks: two tasks have one name ({', '.join(names)}): rename a file")
    _check_files(source, out, limit, loaded_tasks)
    for task in loaded_tasks:
        check_task(task, pair.model)
        check_lengths(task, reader, positions(pair.model), answers_apart(pair.model))
    texts = general_texts(_parts(knowledge) or asked["knowledge"])
    seen: set[str] | None = set()
    if files := run.get("data", {}).get("sha256", {}):
        general = configuration["milora"]["text"] or []
        general = [general] if isinstance(general, str) else general
        check_unseen(texts, files, configuration["data"]["train"], general)
        seen = trained_questions(configuration, files, pictures)
    with Progress() as progress:
        result, samples = evaluate_all(
            pair,
            reader,
            loaded_tasks,
            texts,
            asked["chunks"],
            asked["batch_size"],
            progress,
        )
    _print_scores(result)
    if seen is None:
        typer.echo(
            f"{configuration['data']['train']} is not there as the run had it: not counted is how "
            "many questions stand in the training rows"
        )
    for task in loaded_tasks:
        if seen and not isinstance(task, HarnessTask) and (count := asked_in(seen, task)):
            result["tasks"][task.name]["in_training"] = count
            typer.echo(f"warning: {count} questions of {task.name} also stand in the training rows")
    _write_evaluation(source, out, limit, result, samples)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_files(source: Path, out: Path | None, limit: int | None, tasks: list[Any]) -> None:
    """Refuse what `_write_evaluation` could not write, before it is evaluated."""
    from milora.evaluate import check_files, file_sha256

    own = source / "evaluation.json"
    if out is None and limit is None and own.exists():
        check_files(own, {task.name: file_sha256(task) for task in tasks})


def _write_evaluation(
    source: Path, out: Path | None, limit: int | None, result: dict[str, Any], samples: list[Any]
) -> None:
    """Into `out`, else into the run's own files; a trial of some rows changes nothing there."""
    from milora.evaluate import merge_evaluations, save_evaluation

    own = source / "evaluation.json"
    if out:
        save_evaluation(out, out.with_suffix(".samples.jsonl"), result, samples)
        typer.echo(f"written: {out}")
    elif own.exists() and limit is None:
        files = own, source / "samples.jsonl"
        save_evaluation(*files, *merge_evaluations(*files, result, samples))
        typer.echo(f"written: {own}")
    else:
        why = "since --limit makes it a trial" if own.exists() else f"since {own} is not there"
        typer.echo(f"not written, {why}: name a file with --out")


def _evaluate_chain(
    source: Path, limit: int | None, out: Path | None, base: str | None, trust_remote_code: bool
) -> None:
    from milora.compare_page import Table
    from milora.lineage import chain
    from milora.progress import Progress
    from milora.transfer import as_now, evaluate_chain, load_tasks, sentences, table
    from milora.verify import open_run

    links = as_now(chain(source)) if out else chain(source)
    pair, reader, _ = open_run(source, trust_remote_code, base)
    _check_files(source, out, limit, load_tasks(links, reader))
    with Progress() as progress:
        result, samples = evaluate_chain(links, pair, reader, progress, limit)
    _print_scores(result)
    _print_table(Table(*table(result["continual"])))
    for sentence in sentences(result["continual"]):
        typer.echo(sentence)
    _write_evaluation(source, out, limit, result, samples)


@app.command(
    epilog="Example: milora compare run.yaml --methods lora,milora,lora:training.weight_decay=0.1 "
    "--seeds 0,1,2 --learning-rates 1e-4,3e-4,1e-3,3e-3"
)
def compare(
    config: Annotated[Path, typer.Argument(help="A configuration; output_dir holds all runs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Override a key.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated METHOD or METHOD:key=value.")
    ] = "lora,milora",
    seeds: Annotated[str, typer.Option(help="The first chooses the rates.")] = "0,1,2",
    learning_rates: Annotated[
        str, typer.Option(help="Tried for every method.")
    ] = "1e-4,3e-4,1e-3,3e-3",
    widen: Annotated[
        bool, typer.Option("--widen", help="Try more while a method's best rate is at the edge.")
    ] = False,
    every_rate: Annotated[
        bool,
        typer.Option("--every-rate", help="All seeds at all rates: what equal score costs."),
    ] = False,
) -> None:
    """Methods at their best rates over seeds: one table; continues by itself."""
    _quiet()
    from milora.compare import arms_of, parse_arm
    from milora.compare import compare as run_comparison
    from milora.compare_page import tables
    from milora.progress import Progress

    arms = [parse_arm(text) for text in arms_of(methods)]
    numbers = _numbers("--seeds", seeds, int), _numbers("--learning-rates", learning_rates, float)
    with Progress() as progress:
        result = run_comparison(
            config, overrides or [], arms, *numbers, progress, widen, every_rate
        )
    typer.echo(tables(result))


@app.command(epilog="Example: milora export runs/first --to lora --rank 32 --out lora32")
def export(
    run: Annotated[Path, typer.Argument(help="The run folder, or an adapter folder.")],
    out: Annotated[Path, typer.Option(help="A new folder for the artefact.", callback=_to_make)],
    to: Annotated[
        str,
        typer.Option(
            help="lora (rank 2r, or --rank), merged (safetensors), gguf (a LoRA for llama.cpp) or "
            "gguf-merged."
        ),
    ] = "lora",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Best approximation of this rank, with its error.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="The smallest within this relative error, such as 0.01.")
    ] = None,
    spread: Annotated[
        bool,
        typer.Option(
            "--spread", help="Ranks by weight, in all as many parameters as one rank for all."
        ),
    ] = False,
    bits: Annotated[int, typer.Option(help="Of a number in the file: 32 or 8.")] = 32,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the result for other tools: a plain LoRA, merged weights, GGUF.

    Merging reads and writes the files of the base a block at a time, in their dtype, and says what
    of the update their rounding lost. A smaller LoRA says its error, by layer, and the KL it has.
    """
    _quiet()
    from milora.artefacts import export_run
    from milora.compare_page import Table
    from milora.progress import Progress
    from milora.smaller import Smaller, by_layer

    smaller = Smaller(rank, max_error, spread, bits)
    with Progress() as progress:
        done = export_run(run, out, to, smaller, trust_remote_code, base, progress)
    if done.errors:
        own = ", behind its rank" * (len(set(done.ranks.values())) > 1)
        typer.echo(f"relative error of each weight's update{own}:")
        _print_table(Table(*by_layer(done)))
    typer.echo(done.said)


@app.command(epilog="Example: milora compress smollm2-135m --bits 4 --text general.txt --out small")
def compress(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or smollm2-135m.")],
    bits: Annotated[
        int | None, typer.Option(help="4 (nf4) or 8 (int8), of the linear layers; needs --out.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="What the largest components of every layer are to keep of its outputs."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the packed model.", callback=_to_make)
    ] = None,
    text: Annotated[
        str, typer.Option(help="What the loss is measured on: a file, or Python's help topics.")
    ] = "default",
    chunks: Annotated[int, typer.Option(min=1, help="Pieces of it, of 512 tokens.")] = 16,
    dtype: Annotated[
        str, typer.Option(help="Of the original: auto, float32 or bfloat16.")
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make the base smaller and say what it costs: size, perplexity, KL.

    Packed numbers make a folder to train on. Principal parts are measured only, since no library
    loads a weight as two factors.
    """
    if (bits is None) == (energy is None):
        raise UserError("say how: --bits 4, --bits 8 or --energy 0.99, one of them")
    if (bits is None) == (out is not None):
        raise UserError(
            "--bits needs --out, a new folder; --energy writes nothing: no library loads a weight "
            "as two factors, and multiplied out it is as large as before"
        )
    _quiet()
    from milora.compare_page import Table
    from milora.compress import pack, principal_parts, sentence, table
    from milora.progress import Progress

    with Progress() as progress:
        if out is not None and bits is not None:
            found = pack(model, out, bits, text, chunks, dtype, trust_remote_code, progress)
        else:
            found, _ = principal_parts(
                model, energy or 0.0, text, chunks, dtype, trust_remote_code, progress
            )
    _print_table(Table(*table(found)))
    typer.echo(sentence(found))
    if out is not None:
        typer.echo(
            f"\n{out}: to train on it, with factors of the original, set model: {out} and "
            f"milora.factors_from: {model}"
        )


@app.command(epilog="Example: milora combine runs/a runs/b --how ties --rank 64 --out both")
def combine(
    runs: Annotated[list[Path], typer.Argument(help="Run or adapter folders of one base.")],
    out: Annotated[Path, typer.Option(help="A new folder for the adapter.", callback=_to_make)],
    how: Annotated[str, typer.Option(help="sum (exact), ties or dare.")] = "sum",
    weights: Annotated[str, typer.Option(help="One for each, with commas; default 1.")] = "",
    density: Annotated[
        float | None,
        typer.Option(help="The share of entries that ties and dare keep.", show_default="0.5"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="The most it may have; default: the ranks' sum.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of what dare drops.", show_default="0")
    ] = None,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make one adapter of several of one base; what they have in common is said first."""
    _quiet()
    from milora.combine import combine as run_combination
    from milora.progress import Progress

    given = _numbers("--weights", weights, float) or None
    with Progress() as progress:
        said = run_combination(
            runs, out, how, given, density, rank, seed, base, trust_remote_code, progress
        )
    typer.echo(said)


@app.command(
    epilog="Example: milora verify runs/first/adapter --server http://localhost:8000 --model tuned"
)
def verify(
    adapter: Annotated[
        Path, typer.Argument(help="An adapter folder, a run folder, or what export wrote.")
    ],
    base: Base = None,
    server: Annotated[
        str | None, typer.Option(help="Ask this OpenAI-compatible server; loads no model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its name on the server; default: the only adapter.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Mean difference a server may have, in nats.", show_default="0.1"),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check an adapter against its base: fingerprint, step 0, format, probe prompts.

    With --server the probes go to a running server: exit code 3 if it ignores the adapter, has it
    at a wrong scale, or runs another base; 2 if it cannot be asked ($MILORA_SERVER_KEY is its key).
    """
    if server is None and model is not None:
        raise UserError("--model is the name on a server: add --server, or leave it out")
    if server is None and tolerance is not None:
        raise UserError("--tolerance is of a server's answers: add --server, or leave it out")
    if server is not None and base is not None:
        raise UserError("--base is loaded here and --server runs elsewhere: give one of them")
    _quiet()
    from milora.server import verify_server
    from milora.verify import verify as run_checks

    if server is None:
        checks = run_checks(adapter, base, trust_remote_code)
    else:
        checks = verify_server(adapter, server, model, 0.1 if tolerance is None else tolerance)
    for check in checks:
        typer.echo(f"{'ok  ' if check.holds else 'FAIL'}  {check.name}: {check.detail}")
    if all(check.holds for check in checks):
        return
    if server is not None:
        raise GateError(f"{server} does not serve {adapter}: {checks[-1].detail}")
    raise UserError(f"{adapter} is not what it was when it was made: do not use it")


@app.command("report", epilog="Example: milora report runs/first --lang ja --out report-ja.html")
def make_report(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    lang: Annotated[str, typer.Option(help="en or ja.")] = "en",
    out: Annotated[
        Path | None, typer.Option(help="Default: report.html in the run.", callback=_to_write)
    ] = None,
) -> None:
    """One self-contained page about a run, for someone who did not train it."""
    from milora.files import write_text
    from milora.report import report

    page, file = report(run, lang), out or run / "report.html"
    write_text(file, page)
    typer.echo(f"{file}: {len(page) / 1000:.0f} kB")


@app.command(
    epilog="Example: milora gate runs/first   (or --gate 'knowledge.kl <= 0.05' in their place)"
)
def gate(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    gates: Annotated[
        list[str] | None, typer.Option("--gate", help="In place of the run's own; may be repeated.")
    ] = None,
) -> None:
    """Do the measured numbers meet the conditions? Exit 0 if all do, 3 if one does not."""
    from milora.gates import judge, parse_gate, read_finished

    record, evaluation = read_finished(run)
    asked = gates or [one["gate"] for one in record.get("gates", [])]
    if not asked:
        raise UserError(f"{run} has no gates: add --gate, or gates: to its configuration")
    _tell_gates(judge([parse_gate(text) for text in asked], evaluation, record))


def _tell_gates(verdicts: list[Any]) -> None:
    from milora.gates import sentence

    for verdict in verdicts:
        typer.echo(sentence(verdict))
    failed = [f"{verdict.gate} ({verdict.said})" for verdict in verdicts if not verdict.holds]
    if failed:
        raise GateError(f"{len(failed)} of {len(verdicts)} gates failed: {'; '.join(failed)}")


@app.command(epilog="Example: milora chat runs/first   (with --base models/here if it has moved)")
def chat(
    run: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to base and tuned side by side; an empty line or Ctrl-D ends it."""
    _quiet()
    from milora.chat import replies
    from milora.progress import printable
    from milora.verify import open_run

    opened = open_run(run, trust_remote_code, base)

    def questions() -> Any:
        while True:
            if sys.stdin.isatty():
                typer.echo("you> ", nl=False)
            try:
                line = sys.stdin.readline().strip()
            except UnicodeDecodeError as error:
                encoding = error.encoding.upper()
                raise UserError(f"the question is not {encoding}: convert it first") from error
            if not line:
                return
            yield line

    for before, tuned in replies(opened.pair, opened.reader, questions(), max_new_tokens):
        typer.echo(printable(f"base:  {before}\ntuned: {tuned}\n"))


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UserError(f"{option}: {text!r} is no list of numbers with commas") from error


def _print_plan(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    from milora.compare_page import Table
    from milora.preview import covered_lines
    from milora.progress import printable

    console = Console(highlight=False)
    for number, pieces in enumerate(plan["samples"], 1):
        console.print(f"--- sample {number} (trained tokens are marked)", markup=False)
        text = Text()
        for piece, trained in pieces:
            piece = printable(piece)
            if trained and not console.is_terminal:
                piece = f"⟦{piece}⟧"
            text.append(piece, style="black on green" if trained else "dim")
        console.print(text)
    covered = plan["coverage"]
    if covered:
        rows = covered_lines(covered)
        head = ["kind", "weights adapted", "parameters adapted", "share"]
        _print_table(Table(head, rows))
        console.print(f"coverage: {covered['share']:.1%} of the parameters that can be adapted")
    for key, label in (("trained", "trained in full"), ("others", "never adapted")):
        listed = ", ".join(f"{k} ({v['parameters']:,})" for k, v in covered.get(key, {}).items())
        if listed:
            console.print(f"{label}: {listed}", markup=False)
    console.print(f"trained parameters: {plan['parameters']['trainable']:,}")
    console.print(f"estimate: {plan['estimate']}", markup=False)
    if plan["memory_by_kind"]:
        from milora.preview import by_kind

        console.print(f"of the model's step: {by_kind(plan['memory_by_kind'])}", markup=False)


def _print_scores(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from milora.card import all_scores

    table = Table("", "base", "tuned")
    for row in all_scores(result, "{:.3f}  ({:.3f}-{:.3f})"):
        table.add_row(*map(Text, row))
    _print_whole(table)


def _quiet() -> None:
    """transformers' own bars and hints would drown ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings
    from logging import ERROR, getLogger

    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found none
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for library in ("bitsandbytes", "torchao"):  # of kernels they miss, and of every single cast
        getLogger(library).setLevel(ERROR)


def main() -> None:
    """Entry point: exit code 0 done, 2 the user must change something, 3 a gate failed, 1 a bug."""
    try:
        app()
    except ElsewhereError as error:
        sys.exit(error.code)
    except UserError as error:
        # Before the processes talk to each other all of them find the same.
        if os.environ.get("LOCAL_RANK", "0") == "0" or str(error).startswith("process "):
            _fail(str(error))
        sys.exit(2)
    except GateError as error:
        _fail(str(error))
        sys.exit(3)
    except KeyboardInterrupt:
        verb = (sys.argv[1:2] or [""])[0]
        again = dict.fromkeys(("init", "compare", "eval"), "; the same command continues")
        again["train"] = "; `milora train ... --resume` continues"
        sys.exit(_fail(f"stopped{again.get(verb, '')}"))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        if error.errno in NO_ROOM:
            sys.exit(_fail(f"no room left to write{where}: {_once_there_is()}"))
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR):
            sys.exit(_fail(f"cannot read or write{where}: {os.strerror(error.errno)}"))
        raise
    except Exception as error:
        if _no_room(error):
            sys.exit(_fail(f"no room left to write: {_once_there_is()}"))
        if not isinstance(error, RuntimeError) or not _several() or not _lost(error):
            raise
        _fail("another process of this run has ended: see what it said; --resume goes on")
        sys.exit(1)


def _once_there_is() -> str:
    again = "use --resume" if sys.argv[1:2] == ["train"] else "start it again"
    return f"free some space, then {again}"


def _no_room(error: Exception) -> bool:
    """Whether another library's writer says so, in an error of its own (safetensors, torch)."""
    said = str(error)
    number = re.search(r"\(os error (\d+)\)", said)
    torch_writes = "inline_container" in said and re.search("unexpected pos|Writer failed", said)
    return int(number[1]) in NO_ROOM if number else bool(torch_writes)


def _lost(error: RuntimeError) -> bool:
    """Whether it says that another process does not answer any more."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "onnection" in str(error)


def _fail(sentence: str) -> int:
    from milora.progress import printable

    print(f"milora: {printable(' '.join(sentence.split()))}", file=sys.stderr)
    return 2
