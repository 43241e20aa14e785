"""Which layer types of a fine-tune are low-rank, and what would one LoRA rank keep? python examples/spectrum.py BASE TUNED"""

import sys

import lowrank_probe as lp

result = lp.spectrum(sys.argv[1], sys.argv[2])
for row in result.summary.to_dict("records"):
    print(f"{row['layer_type']:12} {row['verdict']:35} rank 16 keeps {100 * row['energy_16']:.0f} % of ‖ΔW‖²")
