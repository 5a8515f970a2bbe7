r"""Words of English text as the Penn Treebank tokenizer splits them, lower-cased and without punctuation.

The rules are those of the tokenizer that the COCO evaluation runs (``PTBTokenizer`` of Stanford CoreNLP 3.4.1, Java),
found by what it does with words, as far as captions need them. Telephone numbers, rare emoticons and text with several
kinds of signs in one word may be split differently; ``tokenizer="java"`` of the metrics runs the program itself.
"""

from __future__ import annotations

import re

PTB_PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""What the COCO evaluation leaves out. Brackets stay in, as its words are lower-cased and these names are not."""

# abbreviations that keep their period in any place, in any case
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf cie
cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov
govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg minn mlle mme mo mon
mont mr mrs ms msgr mt mtg natl nev nov oct okla penn pfc ph plc pres prof profs pte pty pvt rd rep reps rev rt sen sens
sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
# those that do with a capital only, since they are words without
_CAPITAL_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash"
# those that do before a number
_NUMBERED_ABBREVIATIONS = "art ca fig no nos op pp prop"
# words that begin a sentence: a period between a single letter and one of them, capitalised, is no part of an initial
_SENTENCE_STARTS = """
a about according after an as at but earlier he her here however if in it last many more now once one other our she
since so some such that the their then there these they this we what when while yet you
"""
# words that are two
_TWO_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
    "wanna": ("wan", "na"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}
_SPELLED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "¤": "$",
    "¢": "cents",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
}
# quotes, dashes and dots of whatever form are punctuation
_LEFT_OUT = PTB_PUNCTUATION.union(
    ('"', "&quot;", "&apos;", "&nbsp;", "&mdash;", "&ndash;"),
    "\u2010\u2011\u2013\u2014\u2015\u2018\u201c\u201d\u2026\u2039\u203a\xab\xbb",
)
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_FRACTION = re.compile("[¼½¾⅓⅔]")


def _any(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


_L = r"[^\W\d_¼½¾⅓⅔²³¹]"  # a letter of any script
_LD = rf"(?:{_L}|\d)"
_END = rf"(?!{_LD})"
_PARTS = rf"(?:[-\u2011]{_LD}+)"  # the second half of first-rate

# one alternative after the other is tried: longer tokens stand before what they begin with
_TOKEN = re.compile(
    rf"""
    [a-z]+(?=\s)                                                        # most words, only for speed
  | </?[A-Za-z][^<>\s]*>                                                # <br>
  | (?:https?://|www\.)[^\s"<>|()]*[^\s"<>|().,:;!?'-]                  # addresses
  | [\w.+-]*\w@\w[\w-]*(?:\.\w[\w-]*)*
  | [@#][^\W\d]\w*                                                      # @name, #tag
  | [:;=]-?[()DPp]{_END}                                                # :-)
  | &(?:amp|lt|gt|quot|apos|nbsp|mdash|ndash);
  | '(?:tis|twas){_END}
  | (?<!{_LD})'(?:cause|em|n'|n|till?){_END}                            # 'em
  | '(?:[1-9]\d|[2-9]0s)(?!\w)                                          # '90s
  | '(?:s|m|d|ll|re|ve){_END}                                           # the end of it's
  | n't{_END}
  | (?:c'mon|ma'am|o'clock|s'mores|nor'easter|ol'|dunkin'|nat'l){_END}{_PARTS}*
  | (?!{_L}'(?:s|m|d|ll|re|ve){_END})(?-i:[A-HJ-XZdlno])'{_L}{_LD}*     # O'Brien, l'eau
  | [dlj]'(?!{_LD}) | y'(?={_L})
  | {_L}+(?<!n)(?=n't{_END})                                            # do of don't
  | (?:anti|pro)-(?!{_LD})
  | \d+\ \d+/\d+(?!\d)                                                  # 1 1/2
  | {_LD}+(?:-{_L}+){{0,2}}(?:/{_LD}+(?:-{_L}+){{0,2}}){{1,2}}          # and/or, 1/2
  | (?:\d+(?:[.,]\d+)+|{_LD}+){_PARTS}+                                 # first-rate, 3,000-meter
  | (?-i:[A-Z]+(?:&[A-Z]+)+){_END}                                      # AT&T
  | ph\.d\.
  | {_L}(?:\.{_L})+(?:\.{_PARTS}+|\.?(?!{_LD}))                         # a.m., U.S.
  | (?:{_any(_ABBREVIATIONS)})\.(?!{_L})
  | (?=(?-i:[A-Z]))(?:{_any(_CAPITAL_ABBREVIATIONS)})\.(?!{_L})
  | (?:{_any(_NUMBERED_ABBREVIATIONS)})\.(?=\s*\d)
  | c(?:\+\+|\#)
  | {_L}{_LD}*(?:[.!?]{_L}{_LD}*)+                                      # file.png
  | {_L}\.(?!{_L}|\s+(?=(?-i:[A-Z]))(?:{_any(_SENTENCE_STARTS)}){_END})  # an initial
  | {_L}{_LD}*\.(?=[,;:])                                            # any abbreviation
  | {_LD}+(?:_{_LD}+)+
  | {_L}{_LD}*
  | [+-]?\d*(?:[.,:]\d+)+
  | [+-]\d+
  | \d+{_LD}*
  | [!?]{{2,}} | \*{{2,}} | \#{{2,}} | _{{2,}} | \.\.\. | -- | << | >>
  | [^\s\u200b-\u200f\ufeff]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def ptb_words(text: str) -> list[str]:
    """Lower-cased words of ``text``, contractions and possessives as two.

    >>> ptb_words("A man's dog can't sit, it's 5:30 p.m. (and 90% dark)!")  # doctest: +NORMALIZE_WHITESPACE
    ['a', 'man', "'s", 'dog', 'ca', "n't", 'sit', 'it', "'s", '5:30', 'p.m.', '-lrb-', 'and', '90', '%', 'dark',
     '-rrb-']
    """
    text = text.replace("\u2019", "'").replace("\xad", "")
    # 1½ is two words where 1 1/2 is one: the line break keeps them apart
    text = _FRACTION.sub(lambda sign: f"\n{_FRACTIONS[sign[0]]}\n", text)
    words: list[str] = []
    for token in _TOKEN.findall(text):
        word = token.lower().replace(" ", "\xa0")  # a mixed number is one word to ROUGE-L, two to n-grams
        word = _SPELLED.get(word, word)
        if word[:1] in ":;=":
            word = word.replace("(", "-lrb-").replace(")", "-rrb-")
        words += _TWO_WORDS.get(word, (word,))
    return [word for word in words if word not in _LEFT_OUT]
