"""Answers as VQA's own evaluation compares them: without case, articles, most punctuation; numbers as digits.

The rules are those of github.com/GT-Vision-Lab/VQA, vqaEval.py, and of VLMo's glossary.py, oddities included: a
punctuation mark vanishes where a blank is beside one of its kind, or the answer has a comma within a number, and
becomes a blank elsewhere; a period stays before a digit.
"""

from __future__ import annotations

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
ARTICLES = {"a", "an", "the"}
DIGITS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
# An answer that leaves out one of a word's apostrophes gets it back.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
WITH_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
}


def normalise(answer: str) -> str:
    """ "The two dogs." -> "2 dogs"."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    words = PERIOD.sub("", replace_punctuation(answer)).lower().split()
    words = [DIGITS.get(word, word) for word in words]
    return " ".join(WITH_APOSTROPHE.get(word, word) for word in words if word not in ARTICLES)


def replace_punctuation(answer: str) -> str:
    changed = answer
    for mark in PUNCTUATION:
        vanishes = mark + " " in answer or " " + mark in answer or COMMA_IN_NUMBER.search(answer)
        changed = changed.replace(mark, "" if vanishes else " ")
    return changed
