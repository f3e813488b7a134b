"""Texts that tokenizers disagree about, and a strategy that makes more of them."""

# ruff: noqa: RUF001

from __future__ import annotations

from hypothesis import strategies as st

CORPUS = [
    "",
    " ",
    "\n",
    "a",
    "Hello, world!",
    "  leading, trailing  ",
    "The quick brown fox's tail isn't what they'd've LIKED; we'll see, I'M sure YOU'RE not.",
    "def fib(n: int) -> int:\n\treturn n if n < 2 else fib(n-1) + fib(n-2)  # O(2**n)\n\n\n",
    "#include <vector>\nint main() { std::vector<int> v{1,2,3}; return v[0]<<2 & 0xFFu; }\r\n",
    "<html lang='en'><body class=\"x\">&nbsp;</body></html>",
    "SELECT * FROM t WHERE a>=1 AND b<>'x''y'; -- comment",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case XMLHttpRequest iPhone15Pro",
    "1 12 123 1234 12345 123456 1234567890 3.14159 1,000,000 1e-10 0x1F ²³ ½ Ⅳ ①",
    "١٢٣٤٥ ०१२३ 一二三 １２３４",
    "你好，世界！今天天气怎么样？我们去公园吧。",
    "漢字仮名交じり文：東京タワー、ひらがなカタカナ。ｶﾀｶﾅ",
    "안녕하세요 세계! 한국어 문장입니다. ㄱㄴㄷ",
    "中文English混合123数字，GPT4发布于2023年3月14日。",
    "Привет, мир! Ещё ёж. ΑΒΓ αβγ ὐὗὙὛὝὟώ ᾀᾴ ΐ \u2126 \u212a \u212b \u1f7d\u1fbe",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם \u200f\u202bRTL\u202c",
    "नमस्ते दुनिया สวัสดีชาวโลก வணக்கம் ជំរាបសួរ",
    "😀😃 👨\u200d👩\u200d👧\u200d👦 👍🏽 🏳️\u200d🌈 🇩🇪🇯🇵 ❤️ ☺︎ 🧑🏿\u200d🚀",
    "e\u0301 a\u0308o\u0308 Z\u0351\u036b\u0343\u036a\u0302a\u0301l\u0323g\u0303 \u0301alone",
    "a\u00a0b\u2003c\u2009d\u3000e\u200bf\ufeffg\u2028h\u2029i\u0085j\x0bk\x0cl",
    "    four\n        eight\n\t\ttabs\n \t mixed \n\n\n\nfour newlines\r\n\r\nend   ",
    "trailing spaces before newline   \n   and after",
    "....,,,,;;;;!!!!???? --- === *** ### ``` \"\"\" ''' ((([[[{{{<<< \\\\\\ ///",
    "$100 €50 £20 ¥1000 © ® ™ § ¶ † ‡ • … – — ‘quotes’ “double” «guillemets»",
    "∀x∈ℝ: ∃y ≥ x² ∧ ∑ᵢ₌₁ⁿ i = n(n+1)/2 → ∞ ℵ₀ 𝔸𝓑𝕔 𝟘𝟙𝟚",
    "ﬁ ﬂ ß ẞ ſ İ ı Ǆ ǅ ǆ ʰ ª º 𐐀𐐨 𞤀𞤢",
    "null\x00byte \x01\x02\x1f\x7f controls",
    "\ufffd replacement \ufffe\uffff nonchar \U0010ffff \ue000private",
    "<|user|> <|im_start|>system<|im_end|> [INST] x [/INST] <<SYS>> <s> </s> <unk> <0x0A>",
    "<\uff5cUser\uff5c> <｜end▁of▁sentence> <｜ begin▁of▁sentence ｜> <|begin_of_text|>",
    "▁▁ lower one eighth block ▁ Ġ Ċ ĉ literal alphabet",
    "https://example.com/path?q=1&r=%20#frag user@example.org C:\\Users\\me\\file.txt",
    "else {\n//x}\n/**\n*/ a!\n/b ./\r\n/ \n/",
    "ooooooooooooooooooooooooooooooooooooooooooooooooooooooooooooooooooooooooo",
    "\t" * 33 + " " * 129 + "\n" * 17,
    "'s 'S 'll 'LL 'Ll x's x'S X'S 'ſ",
]

_PIECES = [
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "a", "Z", "the", "HTTP", "é", "e\u0301"),
    *("1", "12", "²", "٣", "中", "文字", "の", "カ", "한", "ж", "Ω", "א", "م", "ก", "ʰ", "ǅ"),
    *(".", "'", "'s", '"', "_", "-", "/", "<", "|", "\uff5c", "。", "，", "$", "€", "+", "~", "😀"),
    *("\u200d", "\ufe0f", "\u0301", "\x00", "▁", "Ġ", "<s>", "<｜User｜>", "\ufffd"),
]

_ANY = st.characters(exclude_categories=("Cs", "Cn"))

messy_text = st.lists(st.one_of(st.sampled_from(_PIECES), _ANY), max_size=40).map("".join)
