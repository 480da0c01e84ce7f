"""The embedded stack: which services run where, how they start, how one knows that they work, and the command line.

It knows processes and ports, not pipelines. :mod:`.client` is what others use;
:mod:`.testing` gives tests real services.
"""
