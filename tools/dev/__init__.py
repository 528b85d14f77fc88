"""For this repository's developers: comparison with PaddleSlim and NNCF, training of the sample's weights."""
