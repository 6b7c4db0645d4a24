"""A build backend that builds nothing, which pip asks about a source archive in place of its setup.py.

pip has no option to fetch a source archive without running its code. The folder made here is put first on the
path of pip's processes, where it takes the place of setuptools.
"""

from pathlib import Path

_BACKEND = '''\
"""Says a name and a version, and runs nothing."""

import os


class Data:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = os.path.join(metadata_directory, "{folder}.dist-info")
        os.mkdir(folder)
        with open(os.path.join(folder, "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return os.path.basename(folder)


__legacy__ = Data()
'''


def folder(place: Path, requirement: str) -> Path:
    """Make the backend for an exact requirement, "name==version", in the folder `place`; returns it."""
    name, _, version = requirement.partition("==")
    said = {"name": name, "version": version, "folder": f"{name.replace('-', '_')}-{version}"}
    package = place / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build_meta.py").write_text(_BACKEND.format(**said), encoding="utf-8")
    return place
