"""`phi3v export --verify`: whether a folder is what others expect of this model, wherever it comes from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from phi3v.errors import UserError
from phi3v.export.divergence import (
    LOGITS,
    PROOF,
    PROOF_FACTS,
    answer_in_fresh_process,
    diverge,
    read_logits,
    read_prompts,
)
from phi3v.export.formats import FORMATS, require_extra
from phi3v.export.proof import answer_probes, drawn_probe, load_export
from phi3v.findings import Report
from phi3v.json_files import content_of, read_json
from phi3v.model.checkpoint import SECOND_EMBEDDING, checkpoint_shapes, stored_tensors
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.paths import file_hash, is_hub_id
from phi3v.processing.conversation import stop_token_ids
from phi3v.processing.processor import Phi3VProcessor
from phi3v.processing.tokenizer import TOKENIZER_CONFIG

INCOMPLETE = "the save was not complete: export the run again"


def verify_folder(folder: Path, console: Console | None, *, base: str | None = None) -> Report:
    """Check every part of a model or adapter folder; each finding is shown as it is made.

    Args:
        base: the model that an adapter goes on, if not the one that it names.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder))
    return _Inspection(folder, console, base).run()


class _Inspection:
    def __init__(self, folder: Path, console: Console | None, base: str | None) -> None:
        self.folder = folder
        self.base = base
        self.report = Report(console)
        self.say = self.report.say
        self.is_adapter = (folder / "adapter_config.json").is_file()

    def run(self) -> Report:
        checks: list[Callable[[], None]] = [self.manifest]
        if (self.folder / PROOF).is_dir():
            checks += [self.processor, self.end_tokens, self.proof]
        else:
            checks += [self.adapter] if self.is_adapter else [self.keys, self.end_tokens, self.remote_code]
            checks += [self.values, self.processor, self.answer]
        for check in checks:
            with self.report.checking(check.__name__.replace("_", " ")):  # a damaged file of the folder
                check()
            if not self.report.ok and check in (self.keys, self.adapter, self.values, self.processor):
                break  # the rest would fail for the same reason
        return self.report

    def manifest(self) -> None:
        path = self.folder / "manifest.json"
        if not path.is_file():
            self.say("manifest", "warn", "there is none, so damage on the way would not be seen", "export it anew")
            return
        hashes = read_json(path).get("sha256")
        if not isinstance(hashes, dict) or not hashes:
            self.say("manifest", "fail", f"{path}: names no file (sha256)", "export it anew")
            return
        files = {name: self.folder / name for name in hashes}
        wrong = [name for name, file in files.items() if not file.is_file() or file_hash(file) != hashes[name]]
        if wrong:
            what = f"{len(wrong)} files are missing or not what was written, first {wrong[0]}"
            self.say("manifest", "fail", what, "copy the folder again, or export it anew")
        else:
            self.say("manifest", "pass", f"{len(hashes)} files are what was written")

    def keys(self) -> None:
        try:
            config = Phi3VConfig.from_pretrained(self.folder)
            shapes = checkpoint_shapes(self.folder)
        except (OSError, ValueError, SafetensorError) as error:
            hint = "is this the folder of a model?"
            self.say("weights", "fail", f"cannot be read: {str(error).splitlines()[0]}", hint)
            return
        with content_of(self.folder / "config.json"), torch.device("meta"):
            skeleton = Phi3VForCausalLM(config)
        expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        missing = sorted(expected.keys() - shapes.keys())
        unexpected = sorted(shapes.keys() - expected.keys() - {SECOND_EMBEDDING})
        other = sorted(name for name in expected.keys() & shapes.keys() if shapes[name] != expected[name])
        if SECOND_EMBEDDING in shapes:
            what = f"{SECOND_EMBEDDING} is a second copy of the embeddings"
            self.say("weights", "warn", what, "export it with phi3v export, which leaves it out")
        for names, what in (
            (missing, "missing"),
            (unexpected, "unknown to the architecture"),
            (other, "of another shape"),
        ):
            if names:
                self.say("weights", "fail", f"{len(names)} tensors are {what}, first {names[0]}", INCOMPLETE)
        if not (missing or unexpected or other):
            self.say("weights", "pass", f"{len(expected)} tensors, by the names and shapes of the official layout")

    def adapter(self) -> None:
        fields = read_json(self.folder / "adapter_config.json")
        base = self.base or fields.get("base_model_name_or_path")
        if not base:
            hint = "write base_model_name_or_path into adapter_config.json"
            self.say("adapter", "fail", "it does not say which model it goes on", hint)
        elif not (self.folder / "adapter_model.safetensors").is_file():
            self.say("adapter", "fail", "adapter_model.safetensors is missing", "export the run again")
        elif not Path(base).is_dir() and not is_hub_id(base):
            self.say("adapter", "fail", f"its base {base} is not here", "export it again with --model FOLDER")
        else:
            self.say("adapter", "pass", f"rank {fields.get('r')}, on {base}")

    def values(self) -> None:
        dtypes: dict[str, int] = {}
        for _, name, tensor in stored_tensors(self.folder):
            if not tensor.numel():
                self.say("values", "fail", f"{name} is empty", INCOMPLETE)
                return
            if not torch.isfinite(tensor).all():
                self.say("values", "fail", f"{name} is not finite", "take an earlier checkpoint of the run")
                return
            dtype = str(tensor.dtype).removeprefix("torch.")
            dtypes[dtype] = dtypes.get(dtype, 0) + 1
        mixed = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(dtypes.items()))
        self.say("values", "pass" if len(dtypes) == 1 else "warn", f"all finite; {mixed}")

    def processor(self) -> None:
        try:
            processor = Phi3VProcessor.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            hint = "copy preprocessor_config.json and the tokenizer's files from the original model"
            self.say("processor", "fail", f"cannot be loaded: {str(error).splitlines()[0]}", hint)
            return
        self.say("processor", "pass", f"with tokenizer, num_crops {processor.image_processor.num_crops}")
        tokenizer_config = self.folder / TOKENIZER_CONFIG
        if tokenizer_config.is_file() and not read_json(tokenizer_config).get("additional_special_tokens"):
            what = f"{TOKENIZER_CONFIG} has no additional_special_tokens, without which vLLM reads another prompt"
            self.say("processor", "warn", what, "export it with phi3v export")

    def end_tokens(self) -> None:
        path = self.folder / "generation_config.json"
        if not path.is_file():
            self.say("end of answers", "fail", "generation_config.json is missing", "export it with phi3v export")
            return
        known = read_json(path).get("eos_token_id")
        known = known if isinstance(known, list) else [known]
        try:
            wanted = stop_token_ids(Phi3VProcessor.from_pretrained(self.folder).backend_tokenizer)
        except (OSError, ValueError):
            return  # the processor's own check says so
        missing = [token for token in wanted if token not in known]
        if missing:
            what = f"generation_config.json has {known}, and answers end at {wanted}"
            self.say("end of answers", "fail", what, f"set eos_token_id to {wanted} there")
        else:
            self.say("end of answers", "pass", f"eos_token_id {known}")

    def remote_code(self) -> None:
        fields = read_json(self.folder / "config.json")
        modules = {str(entry).split(".")[0] for entry in fields.get("auto_map", {}).values()}
        missing = [
            f"{name}.py" for name in sorted(modules) if "--" not in name and not (self.folder / f"{name}.py").is_file()
        ]
        if not modules:
            what = "config.json has no auto_map: phi3v reads it, programs that want the official code do not"
            self.say("official code", "warn", what, "copy auto_map and the .py files from the original model")
        elif missing:
            what = f"auto_map names {', '.join(missing)}, which is not here; phi3v does not need it"
            self.say("official code", "warn", what, "copy it from the original model for programs that do")
        else:
            self.say("official code", "pass", "auto_map and its files are here")

    def proof(self) -> None:
        """Prove a quantised export again, with the float model's own answers that are kept in it."""
        facts = read_json(self.folder / PROOF / PROOF_FACTS)
        with content_of(self.folder / PROOF):
            name, bound = str(facts["format"]), float(facts["bound"])
            prompts = read_prompts(self.folder / PROOF)
            ours = read_logits(self.folder / PROOF / LOGITS)
        if name in FORMATS:
            require_extra(name)
        try:
            found = diverge(prompts, ours, answer_in_fresh_process(self.folder, self.folder / PROOF)[0])
        except RuntimeError as error:
            self.say("proof", "fail", str(error).strip().splitlines()[-1], "export it anew")
            return
        fault = found.fault(bound)
        if fault is not None:
            self.say("proof", "fail", f"it does not answer as the float model does: {fault}", "export it anew")
        else:
            what = f"{name}: {found}; {bound:.1e} on average is the most, 2-bit weights have {facts['control']:.1e}"
            self.say("proof", "pass", what)

    def answer(self) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model, processor = load_export(self.folder, device, self.base)
            with tempfile.TemporaryDirectory() as work:
                answers = answer_probes(model, processor, [drawn_probe(Path(work), 0)])
        except (OSError, ValueError, RuntimeError) as error:
            what = f"a question about a drawn image fails: {str(error).splitlines()[0]}"
            self.say("answer", "fail", what, "is config.json that of these weights?")
            return
        finite = bool(torch.isfinite(answers.logits[0]).all())
        if not finite:
            self.say("answer", "fail", "the logits are not finite", "take an earlier checkpoint of the run")
        else:
            self.say("answer", "pass", f"a question about a drawn image: {answers.texts[0]!r}")
