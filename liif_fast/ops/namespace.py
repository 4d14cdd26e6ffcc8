"""The namespaces of the ops in torch.ops. They follow from the package's name, so that copies run side by side."""

# "liif_fast", and for a copy under another name (a kernel of the Hub, a vendored package) that name with underscores.
NAMESPACE = (__package__ or "").rpartition(".")[0].replace(".", "_") or "liif_fast"
NATIVE_NAMESPACE = f"{NAMESPACE}_C"  # of the compiled extension
