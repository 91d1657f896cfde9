"""The demo model's tokenizer: byte-level BPE whose merges are worked out, not trained.

Every byte is a token, so any text can be written. Merges make one token of each common Chinese
character (the 3,755 of GB 2312's first level) and of common English words of the subject.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serving.tokenizer.pieces import byte_alphabet

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

_PUNCTUATION = "，。！？；：、（）《》“”‘’【】—…·"

#: Words that get a token of their own, with the space before them.
_WORDS = """
a about above abstract access actual add address after again algorithm all allocation also always
an analysis and another answer any are argument array as ask assembly assign assignment at back
base basic be because been before behind below best better between binary bit block body both
branch break buffer build but by byte cache call called can cannot case change character check
choose class code column command common compare compile compiler compute computer condition
constant contain context control copy correct could count course cycle data deep default define
definition depth describe design different direct do does done down each edge edit element else
empty end engine enough entry error evaluate even every exact example execute expect explain
expression fact false fast field file find first fix flow follow for form format found from full
function general generate get give given go good grammar graph group had handle has have hash he
heap help here high how however if implement import in index infer information initial input
instruction integer interface intermediate into is it item its iterate join just keep kernel key
kind know label language large last later layer leaf learn left length less let letter level lexer
lexical library like limit line linear link list literal live load local long look loop low
machine made main make many map mark match matrix may mean means memory message method model
module more most move much must name need nested never new next no node none not note nothing now
null number object of off offset often old on once one only open operand operation operator
optimization option or order other our out output over own page pair parallel parameter parse
parser part pass path pattern phase place point pointer position possible precedence prefix print
problem process produce production program proof put query question queue quick range read reason
recursive reduce reference register remove repeat replace representation request rest result
return right root rule run same scan scanner scope search second section see semantic semantics
sentence sequence server set several shift should show side simple since single size small so some
source space special stack stage start state statement step still stop store string structure
student such symbol syntax system table take target task tell term terminal test text than that
the their them then there these they thing this those three through time to token tool top track
transition translate traverse tree true try two type under unit until up update use used user
valid value variable vector very visit want was way we well were what when where whether which
while who why will with without word work would write written wrong you your zero
"""


def common_characters() -> list[str]:
    """The Chinese characters of GB 2312's first level, in the standard's order."""
    found = []
    for row in range(0xB0, 0xD8):
        for cell in range(0xA1, 0xFF):
            if row == 0xD7 and cell > 0xF9:  # five cells at the end are unassigned
                break
            found.append(bytes([row, cell]).decode("gb2312"))
    return found


def _merges() -> list[tuple[str, str]]:
    """Merges in order of rank: each word is built from its left end."""
    stand = {byte: character for character, byte in byte_alphabet().items()}
    merges: dict[tuple[str, str], None] = {}
    # Chinese first: bytes of a character join before anything else could.
    for character in [*common_characters(), *_PUNCTUATION]:
        letters = [stand[byte] for byte in character.encode()]
        left = letters[0]
        for letter in letters[1:]:
            merges.setdefault((left, letter))
            left += letter
    space = stand[0x20]
    for word in _WORDS.split():
        left = space
        for letter in word:
            merges.setdefault((left, letter))
            left += letter
    return list(merges)


def build_tokenizer() -> Tokenizer:
    """The tokenizer, the same on every machine."""
    vocabulary: dict[str, int] = {}
    for byte, character in sorted((byte, text) for text, byte in byte_alphabet().items()):
        vocabulary[character] = byte
    merges = _merges()
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")
