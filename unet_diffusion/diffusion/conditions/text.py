"""Captions as a condition: a BPE tokenizer and a transformer with the architecture of CLIP's text encoder.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 4.3.1) train the transformer on the captions together
with the denoiser; Stable Diffusion freezes CLIP's (Radford et al. 2021, https://arxiv.org/abs/2103.00020). Both use
the same class of the package transformers here, so that either becomes a stock StableDiffusionPipeline.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Condition, Encode, Request, by_turns
from unet_diffusion.runtime.atomic_files import read_json
from unet_diffusion.runtime.initial_weights import WithoutInitialWeights
from unet_diffusion.runtime.safe_loading import check_safetensors

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SPECIAL = {"<|startoftext|>": 0, "<|endoftext|>": 1}  # ids in a tokenizer that is trained here
WORD_END = "</w>"
SMALLEST_VOCAB = len(SPECIAL) + 2 * 256
FIXED = {  # fields of a text encoder's config.json that must be as in CLIP
    "attention_dropout": 0.0,
    "layer_norm_eps": 1e-5,
}


class TextTokens(Condition):
    """A caption for each image as tokens to attend to: token ids (B, L) int64 become (B, L, context_dim).

    L is max_length. The null is the empty caption. `learn_words` trains the tokenizer, which is part of the state.

    Args:
        context_dim: Width of the transformer, which must be the network's context_dim.
        vocab_size: Largest number of tokens of the tokenizer, at least 514.
        max_length: Length L of a caption in tokens, with its start and end token; longer captions are cut.
        num_layers: Number of layers of the transformer.
        num_heads: Number of attention heads of the transformer.
        hidden_act: Activation of the transformer, "quick_gelu" as in CLIP or "gelu".
        frozen: Keep the transformer's weights as they are.
        dropout: Probability of the empty caption in training; 0: there is no null.

    Raises:
        ImportError: If the package transformers is missing.
        ValueError: If context_dim is not a multiple of num_heads.
    """

    batch_key, network_argument = "captions", "context"
    options = needs = ("captions",)
    purpose = "draws from captions"
    pipeline_role = "prompt"

    def __init__(
        self,
        context_dim: int,
        *,
        vocab_size: int = 4096,
        max_length: int = 32,
        num_layers: int = 4,
        num_heads: int = 4,
        hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu",
        frozen: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__(dropout)
        if context_dim % num_heads:
            raise ValueError(f"context_dim must be a multiple of num_heads, got {context_dim} and {num_heads}")
        self.config = {
            "context_dim": context_dim,
            "vocab_size": vocab_size,
            "max_length": max_length,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "hidden_act": hidden_act,
            "frozen": frozen,
            "dropout": dropout,
        }
        self.encoder = _text_model(self.config).requires_grad_(not frozen)
        self.tokenizer: CLIPTokenizer | None = None
        self.captions: list[str] | None = None  # of all images of the data, after bind_data
        self._tokens_of_data: Tensor | None = None  # token ids of these captions, (N, L), on the device
        self.empty_caption: Tensor  # token ids, (L,), on the device: a step would wait for a copy
        self.register_buffer("empty_caption", torch.zeros(max_length, dtype=torch.int64), persistent=False)

    def learn_words(self, captions: Sequence[str]) -> None:
        """Train the tokenizer (byte pair encoding, as in CLIP) on captions, unless there already is one.

        Raises:
            ValueError: If vocab_size has no room for the 256 bytes, within a word and at its end.
        """
        if self.tokenizer is None:
            self.take_tokenizer(_tokenizer_of(captions, self.config["vocab_size"]))

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """The token ids of captions, (N, max_length) int64, padded at the end.

        Raises:
            RuntimeError: If there is no tokenizer yet.
        """
        if self.tokenizer is None:
            raise RuntimeError("the tokenizer must be trained first: call learn_words")
        encoded = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return encoded.input_ids

    def tokenize(self, caption: str) -> list[int]:
        """The token ids of a caption, its beginning and end included, before it is cut.

        Raises:
            RuntimeError: If there is no tokenizer yet.
        """
        if self.tokenizer is None:
            raise RuntimeError("the tokenizer must be trained first: call learn_words")
        return self.tokenizer(caption, verbose=False).input_ids

    def add_word(self, word: str) -> int:
        """Make a word a token of its own, and return its id, for which the encoder may have no vector yet.

        Raises:
            RuntimeError: If there is no tokenizer yet.
            ValueError: If the tokenizer knows the word.
        """
        if self.tokenizer is None:
            raise RuntimeError("the tokenizer must be trained first: call learn_words")
        tokenizer = copy.deepcopy(self.tokenizer)
        if not tokenizer.add_tokens([word]):
            raise ValueError(f"the tokenizer has a token {word!r} already; choose another word")
        self.config["vocab_size"] = max(self.config["vocab_size"], len(tokenizer))
        self.take_tokenizer(tokenizer)
        return len(tokenizer) - 1

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has, its beginning and end included, before it is cut.

        Raises:
            RuntimeError: If there is no tokenizer yet.
        """
        if self.tokenizer is None:
            raise RuntimeError("the tokenizer must be trained first: call learn_words")
        return [len(ids) for ids in self.tokenizer(list(captions), verbose=False).input_ids]

    def cut(self, captions: Sequence[str]) -> tuple[int, int]:
        """The number of captions longer than max_length, and how many of these equal another one after the cut.

        Raises:
            RuntimeError: If there is no tokenizer yet.
        """
        if self.tokenizer is None:
            raise RuntimeError("the tokenizer must be trained first: call learn_words")
        whole = [tuple(ids) for ids in self.tokenizer(list(captions), verbose=False).input_ids]
        is_long = [len(ids) > self.config["max_length"] for ids in whole]
        originals: dict[tuple[int, ...], set[tuple[int, ...]]] = {}  # by the tokens after the cut
        cut = [tuple(ids) for ids in self.token_ids(captions).tolist()]
        for before, after in zip(whole, cut, strict=True):
            originals.setdefault(after, set()).add(before)
        return sum(is_long), sum(long and len(originals[ids]) > 1 for long, ids in zip(is_long, cut, strict=True))

    def null(self, entry: Tensor) -> Tensor:
        return self.empty_caption.expand_as(entry)

    def forward(self, entry: Tensor) -> Tensor:
        return self.encoder(input_ids=entry).last_hidden_state

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(batch_size, self.config["max_length"], dtype=torch.int64)

    def bind_data(self, datamodule: Any) -> None:
        """Keep the captions of the data, and train the tokenizer, if there is none, on those of the training images.

        Raises:
            ValueError: If the data have no captions.
        """
        captions = getattr(datamodule, "entries", {}).get(self.batch_key)
        if captions is None:
            raise ValueError(
                "the model is conditioned on captions, and the data have none; set data.captions to true, or encode "
                "the images again with --captions"
            )
        self.captions, self._tokens_of_data = captions, None
        self.learn_words([captions[i] for i in datamodule.train_indices.tolist()])

    def copy_learned(self, other: Condition) -> None:
        self.set_extra_state(other.get_extra_state())

    def notes(self) -> list[str]:
        if self.captions is None:
            return []
        num_cut, num_equal = self.cut(self.captions)
        equal = f", by which {num_equal} become equal to another" if num_equal else ""
        length = f"max_length {self.config['max_length']}"
        return [f"captions: {num_cut} of {len(self.captions)} cut to the tokens of {length}{equal}"]

    def read(self, batch: Mapping[str, Any], encode: Encode = lambda images: images) -> Tensor:
        """The token ids of a batch, (B, L): its "captions", or the captions of the images that its "index" names."""
        if self.batch_key in batch or self.captions is None or "index" not in batch:
            return super().read(batch)
        if self._tokens_of_data is None:
            self._tokens_of_data = self.token_ids(self.captions).to(batch["index"].device)
        return self._tokens_of_data[batch["index"]]

    def meaning(self) -> Any:
        return [self.get_extra_state().tolist(), self.config["max_length"]]

    def values_of(self, indices: Sequence[int]) -> dict[str, Any]:
        return {} if self.captions is None else {"captions": [self.captions[i] for i in indices]}

    def from_user(self, request: Request) -> dict[str, Tensor]:
        captions = request.values["captions"]
        tokens = self.token_ids([captions] if isinstance(captions, str) else captions)
        return {"captions": by_turns(tokens, request.num_images)}

    def pipeline_parts(self) -> dict[str, Any]:
        return {"text_encoder": copy.deepcopy(self.encoder).cpu().float().eval(), "tokenizer": self.tokenizer}

    @property
    def pipeline_null(self) -> Any:
        return ""

    def pipeline_outputs(self, pipeline: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """The outputs for a caption, each with its own tokenizer, called as in the pipeline."""
        caption, tokenizer = ["A caption of 7 words, and more"], pipeline.tokenizer
        options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        loaded = pipeline.text_encoder(tokenizer(caption, **options, return_tensors="pt").input_ids)[0]
        encoder = copy.deepcopy(self.encoder).cpu().float().eval()
        return {"outputs of the text encoder": (encoder(self.token_ids(caption))[0], loaded)}

    def get_extra_state(self) -> Tensor:
        """The tokenizer as the bytes of its JSON, uint8, for a checkpoint; empty if there is no tokenizer."""
        if self.tokenizer is None:
            return torch.zeros(0, dtype=torch.uint8)
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        words = {name: state["model"][name] for name in ("vocab", "merges")} | {"pad_token": self.tokenizer.pad_token}
        words["added"] = [token["content"] for token in state["added_tokens"] if not token["special"]]
        return torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the tokenizer from `get_extra_state`."""
        if len(state):
            words = json.loads(bytes(state.tolist()))
            merges = [tuple(pair) for pair in words["merges"]]
            tokenizer_class = import_transformers().CLIPTokenizer
            tokenizer = tokenizer_class(vocab=words["vocab"], merges=merges, pad_token=words["pad_token"])
            tokenizer.add_tokens(words.get("added", []))
            self.take_tokenizer(tokenizer)

    def take_tokenizer(self, tokenizer: "CLIPTokenizer") -> None:
        """Read captions with this tokenizer from now on.

        Raises:
            ValueError: If it has more tokens than the vocabulary of the transformer.
        """
        num_tokens, vocab_size = len(tokenizer), self.config["vocab_size"]
        if num_tokens > vocab_size:
            raise ValueError(f"vocab_size must be at least the tokenizer's {num_tokens} tokens, got {vocab_size}")
        tokenizer.model_max_length = self.config["max_length"]
        self.tokenizer, self._tokens_of_data = tokenizer, None
        self.empty_caption.copy_(self.token_ids([""])[0])
        config = self.encoder.config  # an exported pipeline contains it
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def pretrained_text(folder: str | Path, *, dropout: float = 0.1, frozen: bool = True) -> TextTokens:
    """The condition of a CLIP text encoder and its tokenizer, from a local diffusers pipeline folder.

    Args:
        folder: Folder with text_encoder/ and tokenizer/, as in Stable Diffusion 1 and 2.
        dropout: Probability of the empty caption in training.
        frozen: Keep the weights as they are.

    Raises:
        FileNotFoundError: If a subfolder is missing, or the weights are not safetensors.
        ValueError: If the encoder does not have CLIP's architecture.
    """
    folder = Path(folder)
    config = text_config(folder / "text_encoder")
    with WithoutInitialWeights():
        text = TextTokens(**{**config, "frozen": frozen, "dropout": dropout})
    load_frozen(text, import_transformers().CLIPTextModel, folder / "text_encoder", folder / "tokenizer")
    return text


def text_config(folder: Path) -> dict[str, Any]:
    """The arguments of the `TextTokens` that equals the CLIP text encoder in a folder, frozen and never dropped.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the encoder does not have CLIP's architecture.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder.parent} must be a local folder with {folder.name}/config.json")
    config = read_json(config_file)
    _check_build(config, config_file)
    return {
        "context_dim": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "max_length": config["max_position_embeddings"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden_act": config["hidden_act"],
        "frozen": True,
        "dropout": 0.0,
    }


def load_frozen(text: TextTokens, kind: Any, encoder: Path, tokenizer: Path, config: Any = None) -> Any:
    """Load the weights and words of a condition of captions, and return the model of transformers that had them.

    Args:
        text: The condition.
        kind: The class of transformers of the encoder.
        encoder: Folder of the encoder.
        tokenizer: Folder of the tokenizer.
        config: Configuration of the encoder; None: that of the condition.

    Raises:
        FileNotFoundError: If a folder is missing, or the weights are not safetensors.
    """
    if not tokenizer.is_dir():
        raise FileNotFoundError(f"{tokenizer.parent} must be a local folder with {tokenizer.name}/")
    variant = check_safetensors(encoder, "model")
    # The file's own configuration could ask transformers to download and run kernels, so it is not used.
    model = kind.from_pretrained(
        encoder,
        config=config or copy.deepcopy(text.encoder.config),
        use_safetensors=True,
        local_files_only=True,
        variant=variant,
        dtype=torch.float32,
    )
    text.encoder.load_state_dict(getattr(model, "text_model", model).state_dict())
    text.take_tokenizer(import_transformers().CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True))
    return model


def _tokenizer_of(captions: Sequence[str], vocab_size: int) -> "CLIPTokenizer":
    """A tokenizer trained on captions. As in CLIP, every byte is a token, within a word and at its end."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCAB}, for single bytes, got {vocab_size}; raise it")
    alphabet = sorted(ByteLevel.alphabet())
    single = [*SPECIAL, *alphabet, *(byte + WORD_END for byte in alphabet)]
    tokenizer_class = import_transformers().CLIPTokenizer
    backend = tokenizer_class(vocab=dict(SPECIAL), merges=[]).backend_tokenizer
    # The trainer breaks ties by token id and gives ids in hash order, except that "special" tokens come first.
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=single, end_of_word_suffix=WORD_END, show_progress=False)
    backend.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    tokens = [*single, *("".join(pair) for pair in merges)]
    return tokenizer_class(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)


def _check_build(config: dict[str, Any], path: Path) -> None:
    expected = {"model_type": "clip_text_model", "intermediate_size": 4 * config["hidden_size"], **FIXED}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} of a text encoder must be {value}, as in CLIP, got {config[name]} in {path}")


def _text_model(config: dict[str, Any]) -> "CLIPTextModel":
    transformers = import_transformers()
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=config["context_dim"],
            intermediate_size=4 * config["context_dim"],
            projection_dim=config["context_dim"],
            num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_heads"],
            max_position_embeddings=config["max_length"],
            vocab_size=config["vocab_size"],
            hidden_act=config["hidden_act"],
            bos_token_id=SPECIAL["<|startoftext|>"],
            eos_token_id=SPECIAL["<|endoftext|>"],
            pad_token_id=SPECIAL["<|endoftext|>"],
            **FIXED,
        )
    )


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        ImportError: If it is missing; the message names the extra that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("captions need the package transformers; pip install unet-diffusion[text]") from error
    return transformers
