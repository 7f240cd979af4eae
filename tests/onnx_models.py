"""ONNX folders with random weights and stand-in tokenizers, laid out as immich publishes models.

For tests/encoders/test_onnx_folder.py and benchmarks/compare.py.
"""

from __future__ import annotations

import json
import random
import string
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn

from mmsearch.encoders.open_clip import VOCABULARY
from mmsearch.encoders.tokenizer import build_tokenizer, read_merges

LANGUAGES = ("eng_Latn", "deu_Latn", "zho_Hans")
TEXT = """a dog runs over the grass two people one red car snowy mountains under clear blue sky
ein hund am strand läuft über das gras perros en la playa собака бежит по траве 狗在草地上跑"""
WORDS = TEXT.split()


class _Tower(nn.Module):
    def __init__(self, network: Any, encode: str) -> None:
        super().__init__()
        self.network, self.encode = network, encode

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(self.network, self.encode)(batch, normalize=True)
        return found


class _Swapped(nn.Module):
    """Takes two inputs in the other order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, second: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(first, second)
        return found


class MaskedText(nn.Module):
    """A text tower as M-CLIP's: it is told which ids are none."""

    def __init__(self, tokens: int, width: int, dim: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(tokens, width)
        self.block = nn.TransformerEncoderLayer(width, 2, width, batch_first=True)
        self.project = nn.Linear(width, dim)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        rows = self.block(self.embeddings(input_ids), src_key_padding_mask=attention_mask == 0)
        mean = (rows * attention_mask.unsqueeze(2)).sum(1) / attention_mask.sum(1)[:, None]
        return nn.functional.normalize(self.project(mean), dim=-1)


def export(network: Any, config: dict[str, Any], tokenizer: Tokenizer, pad: str, folder: Path,
           *, masked: nn.Module | None = None, preprocess: Any = None,
           inputs: tuple[str, str] = ("input_ids", "attention_mask")) -> Path:  # fmt: skip
    """Writes a folder as immich's exporter does: opset 19, one picture or text at a time.

    Args:
        inputs: how the first is called, and the second.
        preprocess: what differs from OpenAI's preprocessing.
        masked: a text tower in place of the network's, that takes an attention mask too.
    """
    (folder / "visual").mkdir(parents=True)
    (folder / "textual").mkdir()
    size, length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    wanted = asdict(PreprocessCfg(size=size, **preprocess or {}))
    set_model_preprocess_cfg(network, wanted)
    for name, document in (
        ("config.json", config),
        ("visual/preprocess_cfg.json", wanted),
        ("textual/tokenizer_config.json",
         {"pad_token": pad, "tokenizer_class": "PreTrainedTokenizerFast"}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(document))
    tokenizer.save(str(folder / "textual/tokenizer.json"))
    network.eval().requires_grad_(False)
    ids = torch.ones(1, length, dtype=torch.int32)
    _to_onnx(_Tower(network, "encode_image"), (torch.zeros(1, 3, size, size),), ["image"],
             folder / "visual/model.onnx")  # fmt: skip
    if masked is None:
        _to_onnx(_Tower(network, "encode_text"), (ids,), ["text"], folder / "textual/model.onnx")
    else:
        tower: nn.Module = masked
        if inputs[0] == "attention_mask":
            tower = _Swapped(masked)
        _to_onnx(tower, (ids, torch.ones_like(ids)), list(inputs), folder / "textual/model.onnx")
    return folder


def _to_onnx(tower: nn.Module, example: Any, names: list[str], path: Path) -> None:
    # The fast path of torch's transformers has no form in ONNX.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(tower.eval(), example, str(path), input_names=names, dynamo=False,
                              output_names=["embedding"], opset_version=19)  # fmt: skip
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def clip_tokenizer() -> Tokenizer:
    """CLIP's, as its repository on the hub has it."""
    merges = read_merges(VOCABULARY)
    start, end = "<|startoftext|>", "<|endoftext|>"
    ours = build_tokenizer(merges).get_vocab()
    ours = {token: place for token, place in ours.items() if place < 49406}
    tokenizer = Tokenizer(
        models.BPE(vocab=ours | {start: 49406, end: 49407}, merges=merges, unk_token=end,
                   end_of_word_suffix="</w>", continuing_subword_prefix="")
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    tokenizer.post_processor = processors.RobertaProcessing((end, 49407), (start, 49406))
    return tokenizer


def gemma_tokenizer(size: int = 800) -> Tokenizer:
    """SigLIP2's kind: byte-pair encoding of whole texts, bytes where a letter is unknown."""
    rng = random.Random(0)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *dict.fromkeys("".join(WORDS) + string.ascii_lowercase)]
    merges: list[tuple[str, str]] = []
    seen = set(tokens)
    for word in [f"▁{word}" for word in WORDS]:  # letter by letter, from the left
        for end in range(1, len(word)):
            if word[: end + 1] not in seen:
                merges.append((word[:end], word[end]))
                seen.add(word[: end + 1])
    made = [left + right for left, right in merges]
    while len(tokens) + len(made) < size - 1:  # and one that is added below
        left, right = rng.choice(made), rng.choice(made[:300])
        if len(left + right) < 24 and left + right not in seen:
            merges.append((left, right))
            made.append(left + right)
            seen.add(left + right)
    vocab = {token: place for place, token in enumerate(tokens + made)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", None, [("<eos>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:4]])
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    return tokenizer


def unigram_tokenizer(size: int = 500) -> Tokenizer:
    """XLM-R's kind, and SigLIP's: SentencePiece's unigrams."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20 + WORDS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", None, [("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def nllb_tokenizer() -> Tokenizer:
    """NLLB's kind: the text's language comes first."""
    tokenizer = unigram_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in LANGUAGES])
    first = tokenizer.token_to_id(LANGUAGES[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{LANGUAGES[0]} $A </s>", None, [(LANGUAGES[0], first), ("</s>", 2)]
    )
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    """LaBSE's kind: it pads with 0."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = sorted(set("".join(WORDS)) | set(string.printable.strip().lower()))
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters), *dict.fromkeys(WORDS)]
    vocab = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
SIGLIP = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map",
          "timm_model_pretrained": False, "timm_proj": "none"}  # fmt: skip
CLIP_TEXT = {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


def clip_vit(folder: Path) -> tuple[Any, dict[str, Any]]:
    config = {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": CLIP_TEXT}
    network = open_clip.CLIP(**config)
    export(network, config, clip_tokenizer(), "<|endoftext|>", folder)
    return network, config


def clip_resnet(folder: Path) -> tuple[Any, dict[str, Any]]:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": CLIP_TEXT}
    network = open_clip.CLIP(**config)
    export(network, config, clip_tokenizer(), "<|endoftext|>", folder)
    return network, config


def siglip(folder: Path) -> tuple[Any, dict[str, Any]]:
    tokenizer = gemma_tokenizer()
    text = {"context_length": 16, "vocab_size": tokenizer.get_vocab_size(), "width": 64, "heads": 2,
            "layers": 2, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "tokenizer_kwargs": {"clean": "canonicalize"}, "hf_tokenizer_name": "stand-in",
            "act_kwargs": {"approximate": "tanh"}}  # fmt: skip
    config = {"embed_dim": 192, "vision_cfg": SIGLIP, "text_cfg": text}
    network = open_clip.CustomTextCLIP(**config, init_logit_bias=-10)
    export(network, config, tokenizer, "<pad>", folder,
           preprocess={"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"})  # fmt: skip
    return network, config


def xlm_roberta(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import XLMRobertaConfig

    tokenizer = unigram_tokenizer()
    config = _huggingface_text(folder, tokenizer, XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=40, pad_token_id=1,
    ), "mean_pooler")  # fmt: skip
    network = open_clip.CustomTextCLIP(**config)
    export(network, config, tokenizer, "<pad>", folder)
    return network, config


def nllb(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import M2M100Config

    tokenizer = nllb_tokenizer()
    config = _huggingface_text(folder, tokenizer, M2M100Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=64, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=40, pad_token_id=1,
    ), "cls_pooler")  # fmt: skip
    network = open_clip.CustomTextCLIP(**config)
    export(network, config, tokenizer, "<pad>", folder)
    return network, config


def _huggingface_text(folder: Path, tokenizer: Tokenizer, text: Any, pooler: str) -> dict[str, Any]:
    own = folder.with_name(f"{folder.name}-text")
    text.save_pretrained(own)
    return {
        "embed_dim": 32, "vision_cfg": VIT,
        "text_cfg": {
            "context_length": 20, "vocab_size": tokenizer.get_vocab_size(), "hf_proj_type": "mlp",
            "hf_model_name": str(own), "hf_model_pretrained": False, "hf_pooler_type": pooler,
            "hf_tokenizer_name": "stand-in",
        },
    }  # fmt: skip


MODELS = {
    "vit": clip_vit,
    "resnet": clip_resnet,
    "siglip": siglip,
    "xlm-roberta": xlm_roberta,
    "nllb": nllb,
}


def random_model(architecture: str, folder: Path) -> Path:
    """One of open_clip's architectures in full size, its tokenizer too."""
    config = open_clip.get_model_config(architecture)
    torch.manual_seed(0)
    network = open_clip.create_model(architecture)
    is_clip = "hf_tokenizer_name" not in config["text_cfg"]
    tokenizer = clip_tokenizer() if is_clip else gemma_tokenizer(config["text_cfg"]["vocab_size"])
    pad = "<|endoftext|>" if is_clip else "<pad>"
    wanted = open_clip.get_model_preprocess_cfg(network)
    del wanted["size"]
    return export(network, config, tokenizer, pad, folder, preprocess=wanted)


if __name__ == "__main__":
    random_model(sys.argv[1], Path(sys.argv[2]))
