"""The tables of docs/deploying.md: each format of `phi3v export`, its size, its distance from the float model, speed.

    python benchmarks/deploy.py --run output/quickstart --docs docs/deploying.md

Two models. A tuned one, the quickstart's run: ``phi3v export --format`` makes, proves, scores and times each export.
And one with the real tower, the real vocabulary and the real width of the decoder, but two of its 32
layers, with random weights: made, proven and timed on fewer prompts, without a score. Speeds are CPU time on one thread
beside our float model in the same run. At last the size of the real model in each format, computed from its shapes.

Rows that the result holds already are not measured again, unless they are named with --formats.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before any library reads it

import torch

from bench_result import ROOT, phi3v, write_between_marks, write_result
from phi3v.export import divergence
from phi3v.export.formats import FORMATS, OPTIONS, FormatOptions
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.presets import init_model, preset_config
from phi3v.model.quantised import decoder_linears
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.methods.loading import make_skeleton

# Name of a row → format and options. `{train}` is the run's own training data.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {}),
    "w8a16": ("w8a16", {}),
    "w4a16": ("w4a16", {}),
    "w4a16, fitted": ("w4a16", {"calibration": "{train}"}),
    "nf4": ("nf4", {}),
    "int8": ("int8", {}),
    "openvino, 8 bits": ("openvino", {"bits": 8}),
    "openvino": ("openvino", {}),
    "onnx, 8 bits": ("onnx", {"bits": 8}),
    "onnx": ("onnx", {}),
}
TOWER_LAYERS = 2
# Prompts for the larger model: pages of more crops take minutes on one thread.
TOWER_KINDS = ("a page of 1x2", "text only")
# Bytes of a weight of the decoder's linear layers with its share of the scales, and of another weight in bf16.
BYTES: dict[str, tuple[float, float]] = {
    "fp8": (1, 2),
    "w8a16": (1, 2),
    "w4a16": (1 / 2 + 2 / 64, 2),
    "nf4": (1 / 2 + 4 / 64, 2),
    "int8": (1, 2),
    "openvino, 8 bits": (1, 1),
    "openvino": (1 / 2 + 2.5 / 32, 1),
    "onnx, 8 bits": (1 + 4 / 32, 2),
    "onnx": (1 / 2 + 4 / 32, 2),
}
BEGIN, END = "<!-- deploy: begin (written by benchmarks/deploy.py) -->", "<!-- deploy: end -->"


def rows_of(model: str) -> list[str]:
    """Rows of a table; random weights have no data that rounding could be fitted to."""
    return [name for name, (_, options) in ROWS.items() if model == "tuned" or "calibration" not in options]


def measure_tuned(run: Path, names: list[str], work: Path) -> dict[str, dict[str, Any]]:
    """Rows of the tuned model, by the real command: those that differ by their format alone in one.

    Where some fail their proof, the others are made all the same, and keep their figures in their folders.
    """
    kinds, options = [ROWS[name][0] for name in names], ROWS[names[0]][1]
    words = [f"{OPTIONS[key]}={str(value).format(train=training_data(run))}" for key, value in options.items()]
    out = work / "tuned"
    shutil.rmtree(out, ignore_errors=True)
    try:
        phi3v("export", run, "--out", out, *words, "--format", *kinds, threads=1)
    except subprocess.CalledProcessError as error:
        if error.returncode != 2:
            raise
    rows = {}
    for name, kind in zip(names, kinds, strict=True):
        file = (out / kind if len(kinds) > 1 else out) / divergence.PROOF / divergence.PROOF_FACTS
        made = json.loads(file.read_text(encoding="utf-8"))["export"] if file.is_file() else {"refused": True}
        rows[name] = {"format": kind} | made
    if all("refused" in row for row in rows.values()):
        raise SystemExit(f"none of {', '.join(names)} was made; the command says why")
    shutil.rmtree(out, ignore_errors=True)
    return rows


def options_of(name: str) -> str:
    return json.dumps(ROWS[name][1])


def training_data(run: Path) -> str:
    from phi3v.config import load_config

    return str(load_config(run / "config.yaml", of_run=True).now_in(run).data.train)


def make_tower_model(folder: Path) -> None:
    """Random weights in float32: the real tower and width, few layers."""
    if (folder / "config.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    init_model("tiny", folder / "small")
    config = preset_config("phi-3.5-vision", num_hidden_layers=TOWER_LAYERS)
    small = Phi3VProcessor.from_pretrained(folder / "small")
    for token in ("eos_token_id", "pad_token_id"):
        setattr(config, token, small.tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = Phi3VForCausalLM._from_config(config, dtype=torch.float32)
    shutil.copytree(folder / "small", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "small")
    model.save_pretrained(folder)


class TowerModel:
    """The float model of real width, what it says to the prompts, and the control's divergence."""

    def __init__(self, work: Path) -> None:
        self.folder, self.exchanged = work / "tower" / "float", work / "tower" / "prompts"
        make_tower_model(self.folder)
        torch.set_num_threads(1)
        decoder: Any = divergence.load_decoder(self.folder)
        model, processor = decoder.model, decoder.processor
        start, context = model.config.long_context_start, model.config.max_position_embeddings
        drawn = divergence.drawn_prompts(processor, start, context)
        self.prompts = [prompt for prompt in drawn if prompt.kind in TOWER_KINDS]
        answers, self.logits, self.speed = divergence.answer_prompts(decoder, self.prompts)
        for prompt, answer in zip(self.prompts, answers, strict=True):
            prompt.answer.extend(answer)
        divergence.round_decoder(model, divergence.CONTROL_BITS)
        _, rounded, _ = divergence.answer_prompts(decoder, self.prompts)
        self.control = divergence.diverge(self.prompts, self.logits, rounded)
        self.exchanged.mkdir(parents=True, exist_ok=True)
        divergence.write_prompts(self.exchanged, self.prompts)

    def measure(self, name: str, work: Path) -> dict[str, Any]:
        """A row: made in a process of its own, answered in another."""
        kind, options = ROWS[name]
        folder = work / "tower" / name.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--make", str(self.folder), str(folder), json.dumps([kind, options])]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        theirs, speed = divergence.answer_in_fresh_process(folder, self.exchanged)
        row = {
            "format": kind,
            "divergence": asdict(divergence.diverge(self.prompts, self.logits, theirs)),
            "control": asdict(self.control),
            "speed": asdict(speed),
            "float_speed": asdict(self.speed),
            "size": size_of(folder),
            "float_size": size_of(self.folder),
        }
        shutil.rmtree(folder)
        return row


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def computed_sizes(layers: int | None = None, other_bytes: int = 2) -> dict[str, float]:
    """GB of Phi-3.5-vision in each format, and as bf16 (``hf``), by its shapes.

    Args:
        layers: of the decoder, in place of its own.
        other_bytes: of a weight that is not quantised, where the format leaves it in the model's dtype.
    """
    config = preset_config("phi-3.5-vision", **({"num_hidden_layers": layers} if layers else {}))
    skeleton = make_skeleton(config)
    linears = sum(skeleton.get_submodule(name).weight.numel() for name in decoder_linears(skeleton))
    others = sum(parameter.numel() for parameter in skeleton.parameters()) - linears
    sizes = {"hf": (linears + others) * other_bytes / 1e9}
    for name, (linear, other) in BYTES.items():
        sizes[name] = (linears * linear + others * (other_bytes if other == 2 else other)) / 1e9
    return sizes


def versions() -> dict[str, str]:
    """Of what makes and runs the formats."""
    names = sorted({module for format_ in FORMATS.values() for module in format_.modules})
    return {name: metadata.version(name) for name in names if importlib.util.find_spec(name) is not None}


def markdown(result: dict[str, Any]) -> str:
    """The three tables."""
    lines = [
        "The quickstart's run (1.5M parameters, LoRA merged); KL in nats, score of its task with a 95 % interval:",
        "",
    ]
    lines += ["| format | size | KL, mean | KL, p99 | score | prompt speed | answer speed | run by |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    some = next((row for row in result["tuned"].values() if "size" in row), None)
    if some is not None:
        lines.append(f"| float | {_size(some['float_size'])} | 0 | 0 | {_score(some['float_score'])} | 1 | 1 | phi3v |")
        control = some["control"]
    for name, row in result["tuned"].items():
        if "size" not in row:
            lines.append(f"| {name} | refused: too far from the float model | | | | | | |")
            continue
        cells = [name, _size(row["size"], row["float_size"]), *_kl(row["divergence"]), _score(row["score"])]
        lines.append(f"| {' | '.join([*cells, *_speeds(row), FORMATS[row['format']].runs_it])} |")
    if some is not None:
        cells = ["*control: 2 bits*", "", *_kl(control), "", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Real tower, vocabulary and width, {TOWER_LAYERS} of 32 decoder layers, random weights in float32; held to no "
        "bound:",
        "",
    ]
    lines += ["| format | size | KL, mean | KL, p99 | prompt speed | answer speed |", "|---|---|---|---|---|---|"]
    for name, row in result["tower"].items():
        cells = [name, _size(row["size"], row["float_size"]), *_kl(row["divergence"]), *_speeds(row)]
        lines.append(f"| {' | '.join(cells)} |")
    for row in list(result["tower"].values())[:1]:
        lines.append(f"| {' | '.join(['*control: 2 bits*', '', *_kl(row['control']), '', ''])} |")
    missing = [
        f"{name} ({model})" for model in ("tuned", "tower") for name in rows_of(model) if name not in result[model]
    ]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    lines += ["", "The real model, 4.15B parameters, **computed** from its shapes, not measured:", ""]
    lines += ["| format | size, GB |", "|---|---|"]
    lines += [f"| {'float (bf16)' if name == 'hf' else name} | {size:.1f} |" for name, size in result["real"].items()]
    return "\n".join(lines)


def _size(size: int, of: int | None = None) -> str:
    return f"{size / 1e6:,.2f} MB" + (f" ({100 * size / of:.0f} %)" if of else "")


def _kl(found: dict[str, Any]) -> list[str]:
    return [f"{found['mean']:.1e}", f"{found['p99']:.1e}"]


def _score(score: dict[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "–"
    return f"{100 * score['value']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _speeds(row: dict[str, Any]) -> list[str]:
    ours, theirs = (divergence.Speed(**row[key]) for key in ("float_speed", "speed"))
    return [f"{theirs.prompt / ours.prompt:.2f}", f"{theirs.answer / ours.answer:.2f}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the quickstart's run")
    parser.add_argument("--formats", nargs="+", choices=tuple(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument(
        "--models", nargs="*", choices=("tuned", "tower"), default=["tuned", "tower"], help="to measure"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "deploy", help="where exports are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "deploy.json")
    parser.add_argument("--docs", type=Path, metavar="FILE.md", help="write the tables between their marks there")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.make:
        model, folder, (kind, options) = *map(Path, arguments.make[:2]), json.loads(arguments.make[2])
        maker = importlib.import_module(f"phi3v.export.formats.{FORMATS[kind].maker}")
        maker.make(model, folder, FormatOptions(kind, **options))
        return
    if arguments.run is None and "tuned" in arguments.models:
        parser.error("name the quickstart's run with --run")
    work = arguments.work.resolve()
    result: dict[str, Any] = {"tuned": {}, "tower": {}}
    if arguments.out.exists():
        result |= json.loads(arguments.out.read_text(encoding="utf-8"))

    def missing(model: str) -> list[str]:
        names = rows_of(model)
        asked = arguments.formats or [name for name in names if name not in result[model]]
        return [name for name in names if name in asked]

    def keep(model: str, name: str, row: dict[str, Any]) -> None:
        rows = result[model] | {name: row}
        result[model] = {each: rows[each] for each in ROWS if each in rows}
        figures = {key: result[key] for key in ("tuned", "tower")}
        figures |= {
            "real": computed_sizes(),
            "tower_computed": computed_sizes(TOWER_LAYERS, 4),
            "made_with": versions(),
        }
        result.update(write_result("deploy", figures, arguments.out))

    if "tuned" in arguments.models:
        for _, same in itertools.groupby(sorted(missing("tuned"), key=options_of), key=options_of):
            names = list(same)
            print(f"tuned, {'; '.join(names)}", file=sys.stderr, flush=True)
            for name, row in measure_tuned(arguments.run.resolve(), names, work).items():
                keep("tuned", name, row)
    if "tower" in arguments.models and missing("tower"):
        tower = TowerModel(work)
        for name in missing("tower"):
            print(f"tower, {name}", file=sys.stderr, flush=True)
            keep("tower", name, tower.measure(name, work))
    if arguments.docs:
        write_between_marks(arguments.docs, (BEGIN, END), markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
