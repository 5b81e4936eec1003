"""Every tolerance of the test suite, with its reason. Nothing here is loosened to make a test pass."""

FP64_EXACT = 1e-12
"""Relative error between two orders of the same fp64 sums: 2^-53 × the square root of the longest sum (1e5) is 4e-14; 25 × that."""

FAST_PATH_ERROR_FACTOR = 1.1
"""design.md, section 6.2: error of the fast path against fp64 is at most this many times that of PEFT + TRL in the same dtype."""

PUBLISHED_4_DIGITS = 5e-5
"""A value printed with four decimals is known to half of the last one."""

BOOTSTRAP_LIMIT = 5e-3
"""Newcombe or Wilson limits against percentile-bootstrap limits, over 1,000 or more problems: the methods differ by O(1/n) = 1e-3 and the
bootstrap's limit is a sample quantile, ± .0003; the interval itself is ± .03 wide, so a wrong term (no correlation, say) is visible."""

FP32_LOGPROB = 1e-5
"""Error of a float32 log-probability relative to the largest logit: sums of at most 1e3 products, √1e3 · 2^-24 = 2e-6; 5 × that."""

FP32_ADVANTAGE = 1e-5
"""Error of a float32 advantage of order 1: mean, difference, variance, root and ratio of some tens of numbers, 2^-24 = 6e-8 each, the
difference with cancellation by up to the ratio of mean and deviation; a hundred roundings."""

RMSNORM_IN_FP32 = 1e-5
"""Two orders of the same sums in an fp64 model of transformers: its norms and rotary angles are float32 even there (2^-24 = 6e-8), a few
dozen of them on the way; gradients of the packed adapter are kept in float32 too."""

FP32_ADAMW = 1e-6
"""One AdamW step in float32 on numbers of order 1: some ten roundings of 2^-24 = 6e-8 each."""

FP32_ONE_ROUNDING = 6e-8
"""A number computed in double and rounded to float32: 2^-24."""

WITHOUT_FMA = 1.25
"""RMS error of AdamW's moments with plain x86-64 kernels over that of torch on this processor, which multiplies and adds in one
rounding: one more of a sum's two or three roundings counts, 1.14 measured. The kernels with FMA are held to 1."""

PARAMETER_ROUNDED_ONCE = 0.7
"""RMS error of AdamW's parameters over torch's: one rounding a step, not two: 1/√2, less where torch rounds 1 − lr λ; .54 measured."""

KERNEL_ERROR_FACTOR = 1.5
"""Error against fp64 of a faster implementation, as a multiple of the reference's in the same dtype: the same roundings in another order.
Random numbers make neither smaller: over the samples of all ops the factor is .3 to 1.2."""

KERNEL_ERROR_FLOOR = 3e-7
"""Added to it, relative: a probability that attention recomputes from a log-sum-exp in float32 carries the rounding of a number of size 4
to 8, 2^-24 · 5 = 3e-7, where the reference keeps the probability itself. Nothing in bfloat16 (2^-9 = 2e-3) can hide behind it."""

GPU_ERROR_FACTOR = {"bf16": 1.1, "fp16": 1.1, "tf32": 1.5, "fp32": 1.5}
"""Error against fp64 of a GPU kernel, as a multiple of torch's own on the same card at the same precision. In bf16 and fp16 the rounding of
the outputs decides, which both have (torch in PEFT's order rounds more often): a tenth for luck. In TF32 and float32 sums in another order
decide."""

LIBRARY_ERROR_FACTOR = 1.6
"""The same for Liger and FlashAttention, where a number is rounded twice that torch rounds once: silu(gate) before its product with up, the
two outputs of attention before they are joined: √2, and a tenth for luck."""

GPU_STEP_IN_FLOAT32 = 1e-4
"""Relative error of a matrix's gradient between two float32 devices through two layers: some hundred roundings of 2^-24 = 6e-8 on the way,
a few per cent of cancellation in the loss's sum of positive and negative advantages; a wrong term costs per cents."""

SAME_IN_FLOAT32 = 2e-6
"""One float32 computation on two memory layouts, numbers of order 1 to 10: torch may sum or vectorise in another order, some 2^-24 · 10."""

TF32_OPERANDS = 2**-10
"""Relative L2 error of products whose operands are rounded to TF32: 10 bits of mantissa, 2^-11 an operand, two in a product."""

LONG_SUMS_IN_FLOAT32 = 6e-6
"""Relative error of dk and dv of a prompt of 3,000 tokens and 3 query heads a key: 9,000 terms summed one after another in float32,
√9000 · 2^-24 = 5.7e-6. (torch's own: a third of the error, since it sums head by head.)"""

MEMORY_PLAN = 0.15
"""The planner's expected peak against the measured one, relative: what issue 3 asks for. The heap's fragments and the libraries' own
buffers are not planned."""

CUMULATIVE_PROBABILITY = 1e-6
"""Sum of up to 101 float32 probabilities that add up to 1, and one difference: √101 · 2^-24 = 6e-7 at worst; measured against 1e-4."""

SAMPLER_LOGP_FP32 = 1e-4
"""|log π_engine − log π_trainer| per token in float32, nats: issue 5's number. Two correct forward passes of the tiny model differ by up to
2e-6, of SmolLM2-135M by 3e-5."""

BF16_ROUNDED_ONCE = 2**-8
"""Relative distance of a number from the nearest bfloat16 is at most 2^-9, from its neighbour (the float32 sum fell just across) 2^-8."""

GRAM_RANK = 1e-7
"""Effective rank from the eigenvalues of G Gᵀ against that from the singular values of G: an eigenvalue that should be 0 is off by 2^-53 of
the largest, its root by 1e-8 of the largest singular value."""

SKETCH_ERRORS = 4
"""Standard errors that the worst of some tens of sketched inner products may be off: 4 of a normal have a chance of 6e-5 each."""

FP32_SUMS = 1e-5
"""Gradients of B through a tiny model whose adapter's values and gradients are float32, relative to the largest: some hundred roundings of
2^-24 = 6e-8 on the way."""

FP32_PROFILE = 1e-5
"""Relative error of a float32 norm through (A Aᵀ)⁺ against fp64: two Gram matrices with a few roundings of 2^-24 = 6e-8 each, times the
condition number of A Aᵀ, 100 for the [64, 96] of the tests; 1.3e-7 measured. A wrong factor (d, r, s) costs more than 1e-2."""
