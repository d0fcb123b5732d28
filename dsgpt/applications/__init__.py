"""Three applications of fine-tuning, each from public data to a table of what was reached.

    records.py                     examples, held out by conversation or document, near copies removed
    support.py news.py legal.py    what each application makes of its data sets
    prepare.py                     the files of an application: what to train on, what to measure with
    base.py                        a small pretrained model, made from plain texts
    run.py                         ways of training compared: prepared, trained, evaluated, resumed where stopped
    tables.py                      what is printed

Every step is a `dsgpt` command that is printed before it runs, so it can be typed on other data.
"""
