"""The losses on traces, of stored targets and of the likelihood alone, computed without a tensor of positions x vocabulary.

    distillation   the two public functions: arguments, checks, what comes back
    sparse         the teacher's side: a few candidates for each position, and what the rest holds
    settings       what can be asked for, and for which kind of targets
    objective      values and gradients at a position, on K candidates, the written token and all others
    divergences    the KL family between two such distributions
    chunked        the vocabulary: head, softmax and gradients, some hundred positions at once
    kernels        the two passes over these logits on a GPU

Axes: `N` positions of a batch, `n` positions of a chunk, `V` vocabulary, `H` hidden, `K` stored candidates, `R` the
candidates and the rest (K + 1), `O` the candidates, the written token if it is none of them, and all others (K + 2).
p is the teacher, q the student. All logarithms are natural.
"""
