"""The user study of the paper's Table 2: a blind web page, a server for its answers, and the analysis.

``page`` builds the page from folders of videos, ``server`` serves it and keeps the answers, ``answers`` reads them from
any source, and ``analysis`` turns them into the table.
"""
