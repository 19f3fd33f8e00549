"""The grammar of every command line, on top of argparse.

- Options come before or after what is positional, as ``--name value`` or ``--name=value``, never abbreviated.
- A list takes one value or several, is repeated, or is written as YAML: ``--metrics anls token_f1``,
  ``--metrics "[anls, token_f1]"``. It ends at the next option and at a recipe; and its last value is what is positional
  where that is missing.
- Any other option is given once. A value may begin with one dash; one that begins with two is written ``--name=value``.
- An unknown option is an error that names the nearest.
- A recipe is a file, or the name of one that comes with the package where there is no such file.
- Help texts end with the default.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console

from phi3v.errors import UserError

Handler = Callable[[argparse.Namespace, Console], "dict[str, Any] | None"]

RECIPE_ENDINGS = (".yaml", ".yml")
# Those of the package, by name.
RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def suggestion(name: str, known: Iterable[str], otherwise: str | None = None) -> str | None:
    """The hint for an unknown name: the known one of the same last part, or spelt alike; ``otherwise`` if none is."""

    def plain(text: str) -> str:
        return text.lstrip("-").replace("-", "_").lower()

    def leaf(text: str) -> str:
        return plain(text).rsplit(".", 1)[-1]

    known = list(known)
    # The name may be right and its branch missing (`learning_rate` for `training.learning_rate`), or a branch itself.
    near = [each for each in known if leaf(each) == leaf(name)]
    near += [each for each in known if plain(each).startswith(f"{plain(name)}.")]
    for part in (plain, leaf):
        spelt = {part(each): each for each in reversed(known)}
        near += [spelt[each] for each in difflib.get_close_matches(part(name), spelt, n=1)]
    return f"did you mean {near[0]}?" if near else otherwise


def find_recipe(word: str) -> Path:
    """The file that a command line names: one of `RECIPES` by its name, else a path, which may not exist.

    Raises:
        UserError: the name is that of a file here as well.
    """
    packaged = RECIPES.get(word)
    if packaged is None or Path(word).is_file():
        return Path(word)
    own = Path(f"{word}.yaml")
    if own.exists() and not own.samefile(packaged):
        what = f"names the recipe that comes with phi3v, and there is {own} here"
        raise UserError(what, where=word, hint=f"name the file, {own}, or move it away")
    return packaged


def words_of(values: Iterable[str]) -> list[str]:
    """The values of a list, of which each may be several, as YAML writes them: ``[a, b]``."""
    words: list[str] = []
    for value in values:
        if value.startswith("[") and value.endswith("]"):
            try:
                words += map(str, yaml.load(value, yaml.BaseLoader))  # a safe one, which leaves every word text
                continue
            except yaml.YAMLError:
                raise UserError(f"cannot be read as a list: {value}", hint="write it as [a, b]") from None
        words.append(value)
    return words


def is_option(word: str) -> bool:
    """Whether a word is an option, not a value: a negative number and text with one dash are values."""
    return word == "-h" or (word.startswith("--") and len(word) > 2)


@dataclass
class _Given:
    """An option of a command line with its values; ``loose`` ones stand after it, not after ``=``."""

    name: str
    action: argparse.Action
    values: list[str] = field(default_factory=list)
    loose: bool = True

    @property
    def is_list(self) -> bool:
        return isinstance(self.action.nargs, str) and self.action.nargs in "+*"


class _HelpWithDefaults(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 14  # argparse forgets that commands are indented, and would break their lines

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_none = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        return text if has_none or "default: " in text else f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """A parser of this grammar: its options are declared as argparse's are, and errors are `UserError`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpWithDefaults, **settings)
        self._verbs: Any = None
        self.default_verb: str | None = None

    def add_subparsers(self, **settings: Any) -> Any:
        self._verbs = super().add_subparsers(required=True, **settings)
        return self._verbs

    @property
    def verbs(self) -> dict[str, Parser]:
        """The commands below this one, by name."""
        return dict(self._verbs.choices) if self._verbs is not None else {}

    def add_group(self, name: str, summary: str, *, default: str | None = None) -> Parser:
        """A command that has others below it, of which ``default`` runs if none is named."""
        group: Parser = self._verbs.add_parser(name, help=summary)
        group.add_subparsers()
        group.default_verb = default
        return group

    def add_command(
        self,
        name: str,
        handler: Handler,
        summary: str,
        example: str,
        *,
        brief: str | None = None,
        on_all_ranks: bool = False,
    ) -> Parser:
        """A command, with ``--json``.

        Args:
            handler: does the work; returns what ``--json`` prints, where ``exit_code`` is taken out.
            brief: its line in the list of all commands, which should fit the screen; default: ``summary``.
            on_all_ranks: the processes of a launcher divide its work; any other command is refused there.
        """
        description = f"{summary[0].upper()}{summary[1:]}."
        command: Parser = self._verbs.add_parser(
            name, help=brief or summary, description=description, epilog=f"example: {example}"
        )
        command.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output, nothing else"
        )
        command.set_defaults(handler=handler, on_all_ranks=on_all_ranks, command=command.prog)
        return command

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse a command line; its keys of the configuration are in ``overrides``.

        Raises:
            UserError: it cannot be read.
        """
        arguments = self.parse_args(words)
        arguments.overrides = {key: value for key, value in vars(arguments).items() if "." in key}
        return arguments

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(args or [])
        if self._verbs is not None:
            if not words or (is_option(words[0]) and words[0] not in self._option_string_actions):
                if self.default_verb is not None:
                    return super().parse_known_args([self.default_verb, *words], namespace)
                hint = f"choose from {', '.join(self.verbs)}; options come after it"
                raise UserError("the command comes first", where=self.prog, hint=hint)
            return super().parse_known_args(words, namespace)
        return super().parse_known_args(self._arrange(words), namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "), hint=f"see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            is_verb = isinstance(action, argparse._SubParsersAction)
            where = self.prog if is_verb else "/".join(action.option_strings) or action.metavar or action.dest
            hint = suggestion(str(value), names, f"choose from {', '.join(names)}")
            raise UserError(f"there is no {value!r}", where=str(where), hint=hint)

    def _arrange(self, words: list[str]) -> list[str]:
        """The words as argparse reads them without guessing: what is positional first, values behind ``=``."""
        positional = [action for action in self._actions if not action.option_strings]
        takes_recipe = any(action.dest == "recipe" for action in positional)
        places, options = self._sort(words, takes_recipe)
        if positional and not places and positional[0].nargs != "?":
            # `eval --metrics anls output/mine`: the last value of a list is the model that is missing otherwise.
            lists = [given for given in options if given.is_list and given.loose and len(given.values) > 1]
            lists = [given for given in lists if given.values[-1] not in (given.action.choices or ())]
            # Best one that its list would refuse.
            lists.sort(key=lambda given: given.action.choices is not None)
            places = [lists[-1].values.pop()] if lists else []
        if len(places) > len(positional) and not any(action.nargs in ("+", "*") for action in positional):
            extra = places[len(positional)]
            hint = f"after {places[0]!r}; see `{self.prog} --help`" if positional else f"see `{self.prog} --help`"
            raise UserError(f"unexpected {extra!r}", hint=hint)
        self._refuse_repeated(options)
        arranged = []
        for given in options:
            if given.is_list:
                try:
                    given.values = words_of(given.values)
                except UserError as error:
                    raise UserError(error.what, where=given.name, hint=error.hint) from None
                given.values = given.values or ["[]"]
            arranged += [f"{given.name}={value}" for value in given.values] or [given.name]
        # After `--` a positional may begin with a dash.
        return [*arranged, "--", *places] if places else arranged

    def _sort(self, words: list[str], takes_recipe: bool) -> tuple[list[str], list[_Given]]:
        places: list[str] = []
        options: list[_Given] = []
        rest = list(reversed(words))
        while rest:
            word = rest.pop()
            if word == "--":
                places += reversed(rest)
                break
            if not is_option(word):
                places.append(word)
                continue
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            if action is None:
                hint = suggestion(name, self._option_string_actions, f"see `{self.prog} --help`")
                raise UserError(f"unknown option {name}", hint=hint)
            given = _Given(name, action, [value] if equals else [], loose=not equals)
            if action.nargs == 0 and equals:
                raise UserError("takes no value", where=name, hint=f"write {name} alone, or leave it out")
            most = 0 if action.nargs == 0 or equals else len(rest) if given.is_list else 1
            may_end = given.is_list or action.nargs == "?"
            while rest and most and not is_option(rest[-1]) and rest[-1] != "--":
                if may_end and takes_recipe and (rest[-1] in RECIPES or rest[-1].lower().endswith(RECIPE_ENDINGS)):
                    break
                given.values.append(rest.pop())
                most -= 1
            if "" in given.values or not (given.values or action.nargs in (0, "?")):
                dashed = rest and rest[-1].startswith("-")
                raise UserError(
                    "needs a value", where=name, hint=f"one that begins with dashes: {name}=…" if dashed else None
                )
            options.append(given)
        return places, options

    def _refuse_repeated(self, options: Sequence[_Given]) -> None:
        first: dict[str, _Given] = {}
        for given in options:
            if given.is_list:
                continue
            before = first.setdefault(given.action.dest, given)
            if before.values != given.values:
                both = " and ".join(" ".join(each.values) or "nothing" for each in (before, given))
                raise UserError(f"is given twice: {both}", where=given.name, hint="name it once")
