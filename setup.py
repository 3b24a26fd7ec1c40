"""What pyproject.toml cannot say: a wheel has conf/ and assets/ inside the package (mmdist/shipped.py finds them)."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithShipped(build_py):
    """An editable install leaves them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("conf", "assets"):
                self.copy_tree(folder, str(Path(self.build_lib, "mmdist", folder)))


setup(cmdclass={"build_py": BuildWithShipped})
