"""What rank does the demo's fine-tune need to do what it does? Its loss on the text that it was not trained on."""

import sys

import lowrank_probe as lp
from lowrank_probe.demo_text import read_prose
from lowrank_probe.demo_training import Recipe
from lowrank_probe.evaluation_terminal import print_evaluation

if len(sys.argv) > 2:
    base, tuned = sys.argv[1:3]
else:
    pair = lp.demo().facts["demo"]
    base, tuned = pair["base"], pair["finetuned"]
held_out = read_prose(Recipe().prose_chars)[7::8]  # the demo holds out every eighth
length, sequences = (32, 8) if len(sys.argv) > 2 else (128, 64)
ranks = [0, 1, 4, 16, 64, "full"]
found = lp.evaluate(base, tuned, held_out, ranks=ranks, length=length, sequences=sequences, batch=16, device="cpu")
print_evaluation(found)
found.save("functional-rank")  # its report.html, losses.npz, …; lp.load reads it back
