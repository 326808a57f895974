"""SparK written out slowly: every op by hand, every site by a loop. The specification that tests compare with."""

import torch
import torch.nn.functional as F


def sites(visible, height, width):
    """Active (batch, row, column) of a feature map, one by one."""
    found = []
    batch, rows, columns = visible.shape
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                if visible[b, i * rows // height, j * columns // width]:
                    found.append((b, i, j))
    return found


def only(x, visible):
    """x at active sites, exact zeros elsewhere."""
    keep = torch.zeros(x.shape[0], 1, *x.shape[2:], dtype=x.dtype)
    for b, i, j in sites(visible, *x.shape[2:]):
        keep[b, 0, i, j] = 1
    return x * keep


def norm(bn, x, visible, stats):
    """BatchNorm over active sites, moments written out."""
    where = sites(visible, *x.shape[2:])
    rows = torch.stack([x[b, :, i, j] for b, i, j in where])
    mean = rows.sum(0) / len(rows)
    variance = ((rows - mean) ** 2).sum(0) / len(rows)
    unbiased = variance * len(rows) / (len(rows) - 1)
    stats[bn] = (
        0.9 * bn.running_mean + 0.1 * mean.detach(),
        0.9 * bn.running_var + 0.1 * unbiased.detach(),
    )
    normed = (rows - mean) / (variance + bn.eps) ** 0.5 * bn.weight + bn.bias
    place = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.long)
    for number, (b, i, j) in enumerate(where):
        place[b, i, j] = number + 1
    table = torch.cat([torch.zeros(1, x.shape[1], dtype=x.dtype), normed])
    return table[place].permute(0, 3, 1, 2)


def conv(module, x, visible):
    """Dense convolution, then only the active sites."""
    y = F.conv2d(x, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)
    return only(y, visible)


def block(module, x, visible, stats):
    """A BasicBlock (two convolutions) or Bottleneck (three) of timm."""
    y, shortcut = x, x
    count = 3 if hasattr(module, "conv3") else 2
    for number in range(1, count + 1):
        y = conv(getattr(module, f"conv{number}"), y, visible)
        y = norm(getattr(module, f"bn{number}"), y, visible, stats)
        if number < count:
            y = y.clamp(min=0)
    if module.downsample is not None:
        for part in module.downsample:
            if isinstance(part, torch.nn.Conv2d):
                shortcut = conv(part, shortcut, visible)
            elif isinstance(part, torch.nn.BatchNorm2d):
                shortcut = norm(part, shortcut, visible, stats)
            elif isinstance(part, torch.nn.AvgPool2d):
                shortcut = only(part(shortcut), visible)
            else:
                assert isinstance(part, torch.nn.Identity)
    return (y + shortcut).clamp(min=0)


def features(net, image, visible, stats):
    """Outputs of the four stages of a timm ResNet."""
    x = only(image, visible)
    if isinstance(net.conv1, torch.nn.Sequential):
        for part in net.conv1:
            if isinstance(part, torch.nn.Conv2d):
                x = conv(part, x, visible)
            elif isinstance(part, torch.nn.BatchNorm2d):
                x = norm(part, x, visible, stats)
            else:
                x = x.clamp(min=0)
    else:
        x = conv(net.conv1, x, visible)
    x = norm(net.bn1, x, visible, stats).clamp(min=0)
    x = only(F.max_pool2d(x, 3, 2, 1), visible)
    stages = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for part in stage:
            x = block(part, x, visible, stats)
        stages.append(x)
    return stages


def loss(method, image, visible, stats):
    """SparK's loss; `stats` gets the running statistics that every norm should have afterwards."""
    stages = features(method.encoder, image, visible, stats)
    deepest = {}
    for x in stages:
        deepest[x.shape[2]] = x  # the last stage of each resolution
    x = None
    levels = [deepest[side] for side in sorted(deepest)]  # coarse to fine
    for number, up in enumerate(method.decoder):
        if number < len(levels):
            layer = method.densify[len(levels) - 1 - number]
            dense = norm(layer.norm, levels[number], visible, stats)
            hidden = only(torch.ones_like(dense[:, :1]), visible) == 0
            dense = torch.where(hidden, layer.token, dense)
            dense = F.conv2d(dense, layer.project.weight, layer.project.bias)
            x = dense if x is None else x + dense
        x = F.conv_transpose2d(x, up.up.weight, up.up.bias, stride=2, padding=1)
        everything = torch.ones_like(visible)
        first, bn1, _, second, bn2 = up.convs
        x = norm(bn1, F.conv2d(x, first.weight, padding=1), everything, stats).clamp(0, 6)
        x = norm(bn2, F.conv2d(x, second.weight, padding=1), everything, stats)
    drawn = F.conv2d(x, method.to_pixels.weight, method.to_pixels.bias)
    p = method.patch_px
    errors = []
    for b, i, j in sites(~visible, *visible.shape[1:]):
        window = (b, slice(None), slice(i * p, (i + 1) * p), slice(j * p, (j + 1) * p))
        true = image[window].flatten()
        mean = true.sum() / len(true)
        variance = ((true - mean) ** 2).sum() / (len(true) - 1)
        target = (true - mean) / (variance + 1e-6) ** 0.5
        errors.append(((drawn[window].flatten() - target) ** 2).sum() / len(true))
    return sum(errors) / len(errors)
