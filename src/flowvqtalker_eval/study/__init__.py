"""The user study of the paper's Table 2.

``page`` builds a blind web page from folders of videos, ``server`` serves it and keeps the answers, ``answers`` reads
them from any source, ``analysis`` evaluates them and ``report`` writes the table.
"""
