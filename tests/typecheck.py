"""The runtime type checker that pytest installs over repairlib: jaxtyping's shapes, and ints where floats are asked."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
