"""A small open_clip folder whose text tower is BERT's, drawn at random, with its files beside."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ["a", "red", "green", "blue", "yellow", "picture", "number", "of", "dog", "run", "##s",
         "##ning", *"0123456789", *(f"##{digit}" for digit in "0123456789")]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTH = 14


def write_architecture(folder, **vision):
    """An architecture without weights; `vision` is open_clip's `vision_cfg`."""
    folder.mkdir(parents=True)
    own = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    document = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": vision or own,
            "text_cfg": {
                "context_length": LENGTH, "hf_model_name": ".", "hf_tokenizer_name": ".",
                "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler",
                "hf_proj_type": "linear",
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }  # fmt: skip
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": LENGTH, "vocab_size": len(SPECIAL) + len(WORDS),
        "pad_token_id": 0,
    }  # fmt: skip
    tokens = {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "pad_token": "[PAD]",
        "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
        "model_max_length": LENGTH,
    }  # fmt: skip
    for name, content in (
        ("open_clip_config.json", document), ("config.json", config),
        ("tokenizer_config.json", tokens),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content))
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
