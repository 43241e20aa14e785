"""The kernels on any tensor: is this matrix more low-rank than noise of its shape?"""

import torch

from lowrank_probe import metrics, svd

torch.manual_seed(0)
A = torch.randn(512, 16) @ torch.randn(16, 384) + torch.randn(512, 384)
norm = svd.fro_norm(A)
found = svd.full_spectrum(A, norm)
r90 = metrics.energy_rank(found.values, norm, 0.9)
print(f"r90 = {r90:.0f}, of pure noise {metrics.null_energy_rank((512, 384), 0.9):.0f}")
print(f"{found.resolved} of {len(found.values)} values are certain to 1e-6 of themselves")
