"""A metric that nobody can look into: a program that is asked on its standard input and answers one number a line.

    python benchmarks/opaque_cost.py

It plays the accounts of a call centre. A question is `<decisions> <answers>`, two strings of 0 and 1, a digit for each
customer: called or not, and would have bought or not. The answer is the mean loss per customer: a call costs 1; a buyer
who was not called costs the sale, log-normal with mean 6, drawn anew at each question (seeded by the question, so that
a run can be repeated). So it is asymmetric, and noisy as a function of the model.
"""

import sys
import zlib

import numpy as np

CALL, SALE, SPREAD = 1.0, 6.0, 1.0


def cost(question: str) -> float:
    decisions, answers = (np.frombuffer(part.encode(), np.uint8) == ord("1") for part in question.split())
    generator = np.random.default_rng(zlib.crc32(question.encode()))
    sales = SALE * generator.lognormal(-(SPREAD**2) / 2, SPREAD, len(answers))
    return float(np.mean(CALL * (decisions & ~answers) + sales * (~decisions & answers)))


if __name__ == "__main__":
    for line in sys.stdin:
        print(cost(line.strip()), flush=True)
