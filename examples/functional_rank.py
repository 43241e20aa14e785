"""What rank does the demo's fine-tune need to do what it does? Its loss on the text that it was not trained on."""

import lowrank_probe as lp
from lowrank_probe.demo_text import read_prose
from lowrank_probe.demo_training import Recipe
from lowrank_probe.evaluation_terminal import print_evaluation

pair = lp.demo().facts["demo"]
held_out = read_prose(Recipe().prose_chars)[7::8]  # the demo holds out every eighth
found = lp.evaluate(
    pair["base"], pair["finetuned"], held_out, ranks=[0, 1, 4, 16, 64, "full"], length=128, batch=16, device="cpu"
)
print_evaluation(found)
found.save("functional-rank")  # its report.html, losses.npz, …; lp.load reads it back
