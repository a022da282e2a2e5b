"""Texts to compare tokenizers of different make by: 30 for each model, and one of a million characters."""

from __future__ import annotations

import random
from collections.abc import Sequence

# What the texts about control tokens are made of, by the name of the model's tokenizer.
SPECIAL: dict[str, Sequence[str]] = {
    "qwen2.5": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<tool_call>"],
    "phi-3": ["<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>", "<s>"],
    "gpt-oss": ["<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|endofprompt|>"],
}

PLAIN = [
    "",
    " ",
    "  two  three   four    spaces\t\ttabs \t mixed  ",
    "\n\n\n a\r\n\r\nb \n \n\tc\r",
    " " * 1000 + "x" + " " * 63 + "y" + " " * 17,
    "a" * 1000 + "ab" * 200,
    "-" * 300 + "=" * 77 + "#" * 5 + " // /// //\n\n",
    "日本語の文章、中文句子，한국어 문장。「引用」ｶﾀｶﾅ ﾊﾟ",
    "𠮷野家で𪚥を𩸽と。㐀㐁 㒨",
    "👨‍👩‍👧‍👦 👩🏽‍🚀👩🏽‍🚀 🏳️‍🌈 🧑🏿‍🤝‍🧑🏻",
    "🇩🇪🇯🇵🇺 1️⃣ #️⃣ ©️ ☺︎ 🤷🏻‍♀️!",
    "اَلسَّلَامُ عَلَيْكُمْ ١٢٣ ۴۵۶ ﷽ لا",
    "שָׁלוֹם עוֹלָם \u200fabc\u200e \u202b(נ)\u202c",
    "e\u0301 n\u0303 A\u030a o\u0308\u0332 q\u0323\u0307 \u0301x",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319A\u0334\u0335\u031cL\u0342\u035bG\u0321O",
    "\u1112\u1161\u11ab\u1100\u1173\u11af 한글 ㅎㅏㄴ",
    "नमस्ते क्षत्रिय ภาษาไทยไม่มีวรรค ქართული አማርኛ",
    "Tiếng Việt, Đường phố; ĲSSEL ŉ ǅ straße İstanbul ΣΊΣΥΦΟΣ ß",
    "I'm can't WE'LL they'RE o'clock 'S 'sS ’s don’t 've'd",
    "HTTPServerError XMLHttpRequest2 iPhone McDONALD's camelCaseABCdef ÉCOLEécole",
    "1234567890 3.14159e-10 1,000,000 0x1F 2²³ Ⅷ ½ ١٢٣٤ 一二三 12345a6789",
    "def f(x: int) -> str:\n    return f'{x**2:>10}'  # ₂\n\n\tif (a<=b) { a+=1; }\n        }\n",
    '{"a":[1,null,"\\u00e9\\n"],"b":{}} https://example.org/?q=a%20b&c=ü#d <a href="x">y</a>',
    "\x00\x01\x1b[31m\x7f\x85\u00a0\u2003\u2028\u2029\ufeff\u200b\u3000end",
    "\ue000\U000f0000 \ufffd\ufffe\U0010ffff \u0378",
    "∑∫√ℝ⊗ 𝔘𝔫𝔦 ｆｕｌｌ ﬁﬂ Å Å Ω Ω ① ㍿ x̂ ≠ =\u0338",
]


def texts(model: str) -> list[str]:
    """The 30 of one model, by the name of its tokenizer."""
    a, b, c, d, e = SPECIAL[model]
    return [
        *PLAIN,
        f"{a}system\nBe brief.{b}\n{a}user\n1 < 2? |> <|{b}\n",
        f"{a}{b} {c}  {d}\n\n{e}\t{a} x{b}\r\n y",
        f"word{a}word{b}émoji👍🏽{c}日本{d} {e}e\u0301{b}",
        f"{a[:-1]} {a[1:]} {b.replace('|', '| ')} {b.upper()} <0x0A> <0xFF> <| |> ▁▁a ▁ {c[:-2]}{c}",
    ]


BLOCKS = [(32, 126), (32, 126), (97, 122), (97, 122), (48, 57), (0xA1, 0x24F), (0x370, 0x52F), (0x5D0, 0x5EA)]
BLOCKS += [
    (0x621, 0x652),
    (0x905, 0x94D),
    (0xE01, 0xE5B),
    (0x3041, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
]
BLOCKS += [(0x1F300, 0x1F64F), (0x300, 0x314)]
SPACES = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\t", " " * 8, "\r\n", "\u3000", ""]


def large_text(seed: int = 7) -> str:
    """Words of one script each, a million characters. Each is in Unicode's form NFC or not, as it happens."""
    draw = random.Random(seed)
    pieces: list[str] = []
    size = 0
    while size < 1_000_000:
        low, high = draw.choice(BLOCKS)
        word = "".join([chr(draw.randint(low, high)) for _ in range(draw.randint(1, 9))])
        piece = word + draw.choice(SPACES)
        pieces.append(piece)
        size += len(piece)
    return "".join(pieces)[:1_000_000]
