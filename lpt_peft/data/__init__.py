"""Long-tailed data sets: images, labels, class names and class counts from folders, lists and other libraries.

Every source becomes an `images.LabelledImages`, a map-style dataset of (image, label). Samplers take its `labels`,
losses and metrics its `class_counts`; none of them takes the dataset itself. Import from the file you need:

    images.py       LabelledImages, and the policy for images that cannot be read
    long_tail.py    indices of a long-tailed subset of a balanced data set, from labels alone
    cifar.py        CIFAR-10/100-LT from the python archives        folder.py       one folder per class
    image_list.py   "path label" lines: Places-LT, ImageNet-LT      inaturalist.py  the JSON of iNaturalist 2018
    from_dataset.py any map-style dataset                           huggingface.py  `datasets`: lpt_peft[hf]
    transforms.py   the preprocessing that a backbone was trained with
    digits.py       a small demo data set: lpt_peft[demo]

Not here: samplers (`lpt_peft.samplers`) and downloads.
"""
