"""The texts of the project: each page is a template, and every number in it is read from ``results/``.

``python -m benchmarks.texts`` writes all pages, ``--check`` says which of them are not what the templates give. A template
lies in ``templates/`` at the path of its page. What it may call:

- ``results("standard/gpt", "standard/pc")``: the tables of some run folders (:class:`benchmarks.texts.tables.Results`);
  ``studies`` has those of studies (:class:`benchmarks.texts.studies.Studies`). Both give numbers with intervals
  (:class:`benchmarks.texts.numbers.Number`), rounded to what the interval allows.
- ``claim(words, condition, ...)``: the words, where all conditions hold. Every word that judges a number stands in one, so
  that results which no longer support it stop the command.
- ``columns_of_tables()``, ``table_of_indices()`` and the like: tables made from the catalogues of the package.
"""
