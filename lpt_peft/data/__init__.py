"""Long-tailed data: images by index, their labels, class names and class counts, from wherever they lie.

Whatever the source, one class comes out, `images.LabelledImages`: a map-style dataset of (image, label). Its `labels`
go to the samplers, its `class_counts` to losses and metrics, which know no dataset. Import the file you need:

    images.py       LabelledImages, and what is done about images that cannot be read
    long_tail.py    which images a long-tailed version of a balanced data set keeps, from labels alone
    cifar.py        CIFAR-10/100-LT from the python archives        folder.py       a folder for each class
    image_list.py   "path label" lines: Places-LT, ImageNet-LT      inaturalist.py  iNaturalist 2018's JSON
    wrap.py         any map-style dataset of yours                  huggingface.py  `datasets`: lpt_peft[hf]
    transforms.py   from image to what a backbone was trained on    digits.py       a small demo: lpt_peft[demo]

Not here: samplers (`lpt_peft.samplers`) and downloads: data sets have terms and mirrors of their own.
"""
