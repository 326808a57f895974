"""Speed: ratios against named peers, each measured in one run and printed only when its gate is green."""
