"""The order of the gallery: what a newcomer wants first comes first."""

from sphinx_gallery.sorting import FileNameSortKey

ORDER = [
    "demo_swap_one_line.py",
    "demo_fixed_point.py",
    "demo_id_vs_jfb.py",
    "demo_own_physics_and_iteration.py",
    "demo_from_optim.py",
    "demo_equivariance.py",
]


class NewcomersFirst(FileNameSortKey):
    """Files of :data:`ORDER` in this order, then all others by name."""

    def __call__(self, filename):
        """Sort key of a file name."""
        known = ORDER.index(filename) if filename in ORDER else len(ORDER)
        return (known, filename)
