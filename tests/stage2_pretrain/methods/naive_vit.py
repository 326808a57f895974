"""A ViT written out slowly: one image at a time, one head at a time, one patch at a time. What tests compare with."""

import math

import torch


def window(image, i, j, p):
    """Pixels of one patch of one image, [C, p, p]."""
    return image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]


def linear(x, module):
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def norm(x, module):
    if isinstance(module, torch.nn.Identity):
        return x
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred**2).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + module.eps) ** 0.5 * module.weight + module.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x, module):
    """[n, C] to [n, C]."""
    heads, size = module.num_heads, module.head_dim
    rows = linear(x, module.qkv)
    out = []
    for head in range(heads):
        q, k, v = (
            rows[:, part * heads * size + head * size : part * heads * size + (head + 1) * size] for part in range(3)
        )
        scores = norm(q, module.q_norm) @ norm(k, module.k_norm).T / math.sqrt(size)
        weights = (scores - scores.max(1, keepdim=True).values).exp()
        out.append(weights / weights.sum(1, keepdim=True) @ v)
    return linear(torch.cat(out, 1), module.proj)


def block(x, module):
    scale1, scale2 = (getattr(part, "gamma", 1.0) for part in (module.ls1, module.ls2))
    x = x + scale1 * attention(norm(x, module.norm1), module.attn)
    return x + scale2 * linear(gelu(linear(norm(x, module.norm2), module.mlp.fc1)), module.mlp.fc2)


def first_tokens(model):
    """Class and register tokens with their positions, one row each."""
    rows = [*([] if model.cls_token is None else model.cls_token[0])]
    rows += [*([] if model.reg_token is None else model.reg_token[0])]
    if not model.no_embed_class:
        rows = [row + model.pos_embed[0, place] for place, row in enumerate(rows)]
    return rows


def position(model, place):
    """Embedding of the patch of that number."""
    return model.pos_embed[0, place + (0 if model.no_embed_class else len(first_tokens(model)))]


def embed(model, pixels):
    """One patch, [C, p, p], as a row."""
    return (model.patch_embed.proj.weight * pixels).sum((1, 2, 3)) + model.patch_embed.proj.bias


def encode(model, rows):
    """Rows of one image through blocks and norm."""
    x = torch.stack(rows)
    for module in model.blocks:
        x = block(x, module)
    return norm(x, model.norm)


def normalised(pixels):
    """A patch by its own mean and deviation."""
    mean = pixels.sum() / pixels.numel()
    variance = ((pixels - mean) ** 2).sum() / (pixels.numel() - 1)
    return (pixels - mean) / (variance + 1e-6) ** 0.5


def sines(i, j, width):
    """Position of a patch in row i, column j, as a float32 holds it."""
    quarter, found = width // 4, []
    for place in (i, j):
        for wave in (math.sin, math.cos):
            found += [wave(place / 10000 ** (channel / quarter)) for channel in range(quarter)]
    return torch.tensor(found, dtype=torch.float32).double()
