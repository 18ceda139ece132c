"""The store: models that were made or downloaded, as plain files in a folder of the user's, and what gets them there.

``model_store`` owns the folder, ``records`` what is noted beside each model; ``wanted`` tells what a MODEL means and
costs, ``obtain`` makes it.
"""
