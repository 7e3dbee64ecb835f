"""Keeps the repository's own scripts out of the wheel: the root folder is the package, but not every file in it is."""

from setuptools import setup
from setuptools.command.build_py import build_py

NOT_PACKAGED = {"noxfile", "setup", "conftest"}


class BuildPackage(build_py):
    """Builds the package without the scripts that only share its folder."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [entry for entry in modules if entry[0] != "moebench" or entry[1] not in NOT_PACKAGED]


setup(cmdclass={"build_py": BuildPackage})
