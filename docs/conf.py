"""The site: the Markdown pages of the repository, the notebook and the reference of all modules."""

import ast
import typing
from collections.abc import Iterable
from pathlib import Path

import jax
from docutils.nodes import Element
from sphinx.addnodes import desc_content, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

ROOT = Path(__file__).parent.parent
API = ROOT / "docs/api"

logger = logging.getLogger(__name__)

SIDEBAR = {
    "Start": ["docs/quickstart", "Walkthrough <docs/walkthrough>"],
    "Your own data": ["docs/own-data", "docs/coco", "docs/fine-tuning"],
    "Methods": [
        "docs/method",
        "All methods <docs/methods>",
        "docs/experts",
        "Plan search <docs/plan-search>",
        "docs/training-to-a-budget",
    ],
    "Plans and serving": ["docs/plans", "Serving <docs/serving>"],
    "Detectors": [
        "docs/porting-weights",
        "Deformable DETR <docs/deformable>",
        "detr_jax/weights/detr-tiny",
        "detr_jax/weights/deformable-tiny",
    ],
    "Speed": ["Kernels <docs/kernels>", "TPUs <docs/tpu>", "Throughput <docs/throughput>"],
    "Reliability": ["Errors <docs/errors>", "docs/long-runs"],
    "Results": [
        "docs/results",
        "Every selector <docs/comparison>",
        "Recipes <docs/recipes>",
        "docs/where-sparsity-goes",
        "docs/negative-results",
        "scripts/studies/README",
    ],
    "Tutorial and reference": ["docs/tutorial", "docs/reference"],
    "Project": ["CHANGELOG", "CONTRIBUTING"],
}

project = "detr-jax"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]

# The source is the repository and its README the front page, so that links are the same here and on GitHub.
root_doc = "README"
include_patterns = ["*.md", "docs/**", "detr_jax/weights/*.md", "scripts/studies/README.md"]

myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are stored, and a test runs it

autodoc_default_options = {"members": True, "special-members": "__call__", "show-inheritance": True}
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Experts": "detr_jax.methods.experts.Experts"}  # as a string; another class has that name too
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # signatures have the types
# jaxtyping's shapes as they are written: Float[Array, 'batch d'].
typing.GENERATING_DOCUMENTATION = "detr_jax"
jax.Array.__name__ = "Array"

# A name in single backticks is a link if there is something of that name here, and code if not.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:.*", r"(?!detr_jax\.).*"),  # other projects are not linked
    ("py:class", r".*\._\w+|.*\.Annotated\[.*"),
    ("py:class", r".*\.(AMethod|AnyArray|Arguments|Class|Item|Loaded|Name|Pixels|Sum|Tree)"),  # type variables
]

html_theme = "furo"
html_title = "detr-jax"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
copybutton_exclude = ".linenos, .gp, .go"  # of a session the input alone


def modules() -> dict[str, ast.Module]:
    """Every module, by the name under which it is installed."""
    found = {}
    for folder in ("detr_jax", "kernels", "convert"):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name if folder == "detr_jax" else f"detr_jax.{name}"] = ast.parse(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


MODULES = modules()
IMPORTED = {
    f"{module}.{name.name}": f"{node.module}.{name.name}"
    for module, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom) and node.module != module and node.module in MODULES
    for name in node.names
}
"""Where a name comes from that a module imports from another one."""


def origin(name: str) -> str:
    """Where a name is defined, and so documented."""
    while name in IMPORTED:
        name = IMPORTED[name]
    return name


def inside(package: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.rpartition(".")[0] == package]


def add_sidebar(app: Sphinx, name: str, source: list[str]) -> None:
    """Appends to the README what would be of no use on GitHub."""
    if name == root_doc:
        for caption, pages in SIDEBAR.items():
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def summaries(names: Iterable[str]) -> list[str]:
    """A table of links, with the first sentence of each docstring."""
    return ["", ".. currentmodule:: None", ".. autosummary::", "   :nosignatures:", "", *[f"   ~{n}" for n in names]]


def write_reference(app: Sphinx) -> None:
    """Writes a page for every module, with a list of what a package offers from its modules."""
    API.mkdir(exist_ok=True)
    for module in MODULES:
        page = [module, "=" * len(module), "", f".. automodule:: {module}"]
        offered = [origin(name) for name in inside(module, IMPORTED) if IMPORTED[name].startswith(f"{module}.")]
        parts = inside(module, MODULES)
        if parts and offered:
            page += ["   :no-members:", *summaries(sorted(offered, key=lambda name: name.rpartition(".")[2].lower()))]
        if parts and module != "detr_jax":  # whose modules docs/reference.rst has in groups
            names = [f"   {part.rpartition('.')[2]} <{part}>" for part in parts]
            page += ["", "Modules", "-------", *summaries(parts), "", ".. toctree::", "   :hidden:", "", *names]
        API.joinpath(f"{module}.rst").write_text("\n".join([*page, ""]), encoding="utf-8")


def skip_generated(app: Sphinx, what: str, name: str, value: object, skip: bool, options: object) -> bool | None:
    """Leaves out the fields of named tuples, whose docstrings say nothing."""
    return True if (getattr(value, "__doc__", None) or "").startswith("Alias for field number") else None


def keep_colons(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Keeps napoleon from taking an attribute's description up to the first colon for a type."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"


def tidy(app: Sphinx, domain: str, kind: str, content: desc_content) -> None:
    """Leaves out what is said of every class, and from the contents of a page the fields of classes."""
    if content.children and content[0].astext() == "Bases: object":
        content.pop(0)
    content.parent["no-contents-entry"] = kind in ("attribute", "property")


def link_imported(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element) -> Element | None:
    """Leads from where a name is imported to where it is documented."""
    target = origin(node["reftarget"])
    if target == node["reftarget"]:
        return None
    return env.domains.python_domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, text)


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of every public function and class that is not in the reference."""
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                name = f"{module}.{node.name}"
                if name not in env.domains.python_domain.objects:
                    logger.warning("the API reference lacks %s; has it a docstring?", name)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_reference)
    app.connect("source-read", add_sidebar)
    app.connect("autodoc-skip-member", skip_generated)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon
    app.connect("object-description-transform", tidy)
    app.connect("missing-reference", link_imported)
    app.connect("env-check-consistency", check_public_names)
