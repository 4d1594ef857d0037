"""Small tokenizers of the families in use, built on the spot."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

_WORDS = ["▁", "▁h", "▁w", "▁wo", "▁▁", "he", "ll", "é", "好", "😀"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz.,!"


def byte_level() -> Tokenizer:
    """GPT-2's family, with merges that end in the middle of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    merges = [("h", "e"), ("Ġ", "w"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("å", "¥")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(
        [AddedToken("foo bar", normalized=False), AddedToken("ünï", normalized=False)]
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's family: a space in front, bytes for what has no token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *_WORDS, *_LETTERS]))}
    merges = [("▁", "h"), ("h", "e"), ("▁", "w"), ("▁w", "o"), ("▁", "▁"), ("l", "l")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's family: the same words, but no bytes."""
    vocab = {token: i for i, token in enumerate(["<unk>", *_WORDS, *_LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "h"), ("▁", "w")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's family, whose text is no concatenation of tokens."""
    words = ["[UNK]", "hello", "wor", "##ld", "##s", ",", "good", "##bye"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def suffixed() -> Tokenizer:
    """GPT-1's family: a word's end is part of its last token."""
    words = ["<unk>", "he", "hello</w>", "wor", "ld</w>", "s</w>"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer
