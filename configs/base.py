"""Every setting and its default, one comment a line. Other files change what they must; the command line overrides both.

python -m bibau_jax.main --config=configs/digits.py --workdir=runs/digits --config.defense.pgd.steps=10
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The defaults: the paper's settings where it states them, at full ResNet-18 size."""
    config = ConfigDict()
    config.seed = 0  # everything random is folded from it
    config.stages = "implant,purify,evaluate,reactivate,report"  # what to do; finished work is skipped
    config.compute = "auto"  # bfloat16 on GPU/TPU and float32 on the CPU; or one of them by name
    config.measured_on = "test"  # or validation: for choosing settings, which must never be done on test images
    config.tensorboard = False  # mirror metrics.jsonl to TensorBoard (needs the extra [tensorboard])
    config.checkpoint_every = 200  # steps between checkpoints of a training in progress (GPU/TPU: at ends of epochs)

    config.distributed = ConfigDict()
    config.distributed.coordinator = ""  # "host:port" of process 0, or "auto" on TPU pods and Slurm; "" for one process
    config.distributed.processes = 1  # how many processes take part
    config.distributed.process = 0  # which one this is

    config.data = ConfigDict()
    config.data.name = "cifar10"  # a file in bibau_jax/data
    config.data.data_dir = ""  # where prepared data sets are kept; "" is ~/tensorflow_datasets
    config.data.manual_dir = ""  # where archives lie that were downloaded by hand
    config.data.download = True  # whether a missing archive may be downloaded
    config.data.folder = ""  # one's own labelled images in place of a data set: a folder of class/picture, or an .npz file
    config.data.test = ""  # more of them, to measure on; "" measures on those held out
    config.data.image_size = 0  # side that one's own images are resized to; 0 leaves them
    config.data.channels = (
        0  # 3 shows grey images of one's own in colour, 1 makes them grey, as the network takes them; 0 leaves them
    )
    config.data.held_out = 0.2  # share of one's own images that is never trained on, where one measures or chooses by it
    config.data.train_size = 0  # training images; 0 takes all that validation leaves
    config.data.clean_size = 2500  # the defender's clean images, drawn from the training images (5 %)
    config.data.clean_ratio = 0.0  # as a share of the training images instead; 0 takes clean_size
    config.data.validation_size = 1000  # held-out clean images: never trained on, the only ones anything may be tuned on
    config.data.padding = 4  # random crop after this much zero padding
    config.data.flip = True  # random horizontal flip
    config.data.gtsrb = ConfigDict({"image_size": 32, "roi": False})  # side in pixels; cut images to the sign's box
    config.data.tiny_imagenet = ConfigDict({"image_size": 32})  # 64 is the published size

    config.model = ConfigDict()
    config.model.weights = ""  # a file of weights to purify (.pth, .tar, .safetensors, ...), in place of a model implanted here
    config.model.container = ""  # key of the weights in a checkpoint that holds several
    config.model.normalisation = "given"  # mean and std below; "auto" tries the usual ones on clean images; or one by name
    config.model.name = "resnet18"  # a network of bibau_jax/models; "auto" tells it by the keys of model.weights
    config.model.file = placeholder(str)  # a Python file with a network of your own instead, as examples/small_vgg.py
    config.model.width = placeholder(int)  # channels of the first stage; what is left open here and below is the network's own
    config.model.stages = placeholder(tuple)  # blocks per stage
    config.model.hidden = placeholder(int)  # VGG: width of the hidden linear layers; 0 for none
    config.model.heads = placeholder(int)  # ViT: of attention; 0 takes one for every 64 of the width
    config.model.patch = placeholder(int)  # ViT: pixels of a patch's side
    config.model.size = placeholder(int)  # ViT: pixels of a side that images are scaled to
    config.model.projection = placeholder(int)  # CLIP's ViT: length of the embedding
    config.model.mean = (0.4914, 0.4822, 0.4465)  # of the pixels, on the 0..1 scale
    config.model.std = (0.247, 0.243, 0.261)

    config.attack = ConfigDict()
    config.attack.name = "badnets"  # a file in bibau_jax/attacks
    config.attack.target_label = 0  # the class that triggered images shall get
    config.attack.poison_ratio = 0.0  # of the whole training set; 0 takes that of the attack's own section
    config.attack.mode = "all_to_one"  # or all_to_all: class y becomes y + 1
    config.attack.badnets = ConfigDict({"variant": "square", "size": 3})  # square or grid; pixels
    config.attack.blended = ConfigDict({"variant": "cartoon", "alpha": 0.2})  # cartoon or noise; weight of the picture
    config.attack.sig = ConfigDict({"delta": 40.0, "frequency": 6.0})  # height of the stripes, 0..255; periods across the image
    config.attack.sig.class_share = 0.0  # above 0: of the target class, instead of poison_ratio; the paper's is 0.9
    config.attack.refool = ConfigDict()
    config.attack.refool.alpha = 0.4  # weight of the image itself
    config.attack.refool.ghost_rate = 0.49  # share of double reflections; the others are out of focus
    config.attack.refool.pool = ""  # folder of pictures to reflect; "" draws them
    config.attack.wanet = ConfigDict({"strength": 0.5, "grid_size": 4})  # of the warp; points of its field along a side
    config.attack.wanet.covers_per_poison = 2.0  # images with a jittered warp and their true labels
    config.attack.iad = ConfigDict({"width": 32, "mask_epochs": 25})  # channels of the generators; the mask's own training
    config.attack.iad.density = 0.032  # what the elements of a mask are pushed below
    config.attack.iad.cross_per_poison = 1.0  # images with another's trigger and their true labels
    config.attack.iad.cumulative = False  # let the generator's gradients add up, as the authors' code does
    config.attack.issba = ConfigDict({"bits": 1, "width": 32, "epochs": 20, "learning_rate": 1e-4})  # of the secret's networks
    config.attack.issba.wait = 1000  # steps from a readable secret until the image begins to count
    config.attack.issba.ramp = 3000  # further steps until it counts fully
    config.attack.issba.image_weight = 10.0  # weight of the image's squared error then
    config.attack.narcissus = ConfigDict({"epsilon": 16.0, "enlarged": 3.0})  # bound of the trigger, 0..255; factor at test
    config.attack.narcissus.epochs = 1000  # passes over the target class in search of the trigger
    config.attack.narcissus.statistics = "train"  # BatchNorm's during that search: train (of the batch) or eval (running)
    config.attack.narcissus.surrogate_epochs = 200
    config.attack.narcissus.warm_up_epochs = 5  # of the surrogate, on the target class alone
    config.attack.narcissus.public = ""  # folder of other pictures, a subfolder a class; "" takes the other classes' images
    config.attack.narcissus.width = 64  # of the surrogate
    config.attack.narcissus.stages = (2, 2, 2, 2)
    config.attack.adap_blend = ConfigDict({"variant": "cartoon", "alpha": 0.2, "test_alpha": 0.2})  # weights of the picture
    config.attack.adap_blend.pieces = 8  # of the picture's 16 in every training image
    config.attack.adap_blend.covers_per_poison = 1.0  # images with the trigger and their true labels
    config.attack.adap_patch = ConfigDict({"variant": "phoenix", "covers_per_poison": 2.0})  # phoenix or firefox at test
    config.attack.adap_patch.opacity = 1.0  # times that of the faint patches in training
    for name in ("adap_blend", "adap_patch"):  # the same, and the pull on poisoned features in training
        config.attack[f"enhanced_{name}"] = ConfigDict(config.attack[name].to_dict() | {"coupling": 1.0})
    config.attack.patch = ConfigDict({"file": ""})  # .npz with mask (0..1) and pattern (0..255): a trigger of one's own
    for name in (
        "badnets",
        "blended",
        "sig",
        "refool",
        "wanet",
        "iad",
        "issba",
        "narcissus",
        "adap_blend",
        "adap_patch",
        "patch",
    ):
        config.attack[name].poison_ratio = 0.1
    config.attack.sig.poison_ratio = 0.05  # half of the target class, and leaves its accuracy
    config.attack.narcissus.poison_ratio = 0.0005
    for name in ("adap_blend", "adap_patch", "enhanced_adap_blend", "enhanced_adap_patch"):
        config.attack[name].poison_ratio = 0.003

    config.implant = ConfigDict()
    config.implant.reuse = ""  # workdir of a run whose backdoored model (same settings) to take instead of training one
    config.implant.innocent = False  # take the clean twin of `reuse` instead: what a defence costs where there is no backdoor
    config.implant.clean_twin = "train"  # "train" one on the same data without poison, "none", or a workdir to take it from
    config.implant.start = ""  # a file of weights that training begins with, in all but the head (.pth, .safetensors, ...)
    config.implant.epochs = 200
    config.implant.batch_size = 128
    config.implant.learning_rate = 0.1
    config.implant.schedule = "multistep"  # x0.1 at 50 % and 75 %; or cosine, constant, one_cycle
    config.implant.momentum = 0.9
    config.implant.weight_decay = 5e-4

    config.scan = ConfigDict({"images": 160, "epochs": 30, "batch_size": 16})  # clean images, passes over them
    config.scan.learning_rate = 0.1
    config.scan.enough = 0.95  # share of images that a trigger must send to its class
    config.scan.patience = 3  # epochs before the mask's weight changes
    config.scan.stop_after = 10  # epochs without a smaller mask
    config.scan.memory = 4.0  # GiB: classes are searched together, as many at once as take about this much
    config.scan.limit = 2.0  # of the anomaly index
    config.scan.share = 0.5  # of the median's size that a suspicious trigger may have at most

    config.verify = ConfigDict({"trigger": "", "target_label": -1})  # the real one, where it is known: .npz; and its class
    config.export = ConfigDict({"format": "safetensors", "path": ""})  # or pth; "" is <workdir>/export

    config.defense = defense()
    config.defense.target_label = config.attack.get_ref("target_label") + 0  # follows the attack's until it is set itself

    config.reactivate = reactivate()
    return config


def reactivate() -> ConfigDict:
    """Settings of the checks that tell a backdoor that is gone from one that is hidden."""
    config = ConfigDict()
    # Or also universal (white-box), square (outputs alone), path (to the backdoored weights), features (for t-SNE).
    config.checks = "retuning,query,bec,orthogonality,linearity"
    config.test_size = 0  # test images that success is counted on; 0 for all

    config.retuning = ConfigDict()
    config.retuning.images = 1024  # that the model is fine-tuned with, poisoned ones included (2 % of CIFAR-10)
    config.retuning.poisoned = 0  # of them; 0 takes the paper's number for the attack (5, 2 or 1)
    config.retuning.repeats = 3  # draws of images, of which R-ASR is the mean
    config.retuning.epochs = 5
    config.retuning.batch_size = 128
    config.retuning.learning_rate = 0.01
    config.retuning.momentum = 0.9

    config.query = ConfigDict({"images": 500, "epsilon": 16.0})  # clean and as many triggered ones; bound, pixels 0..255
    config.query.gradient = "white_box"  # through the purified model; or queries, of its outputs alone
    config.query.alpha = 0.2  # weight of waking the model against leaving a clean one alone
    config.query.epochs = 50
    config.query.batch_size = 128
    config.query.learning_rate = 0.1
    config.query.momentum = 0.9
    config.query.hidden = 1024  # width of the perturbing network
    config.query.directions = 10  # with queries: pairs of steps that a gradient is estimated from
    config.query.sigma = 2.0  # with queries: their size, grey levels
    config.query.budget = 0  # with queries: of them in all, for whole epochs; 0 for any number

    config.universal = ConfigDict({"images": 1000, "epsilon": 12.75, "learning_rate": 0.05})
    config.universal.epochs = 50
    config.universal.inner = 5  # steps on one batch
    config.universal.batch_size = 128
    config.square = ConfigDict({"images": 500, "epsilon": 12.75, "queries": 10_000})  # queries of each image

    config.bec = ConfigDict({"share": 0.1, "layers": 10})  # of a layer's channels; last convolutions, 0 for all
    config.bec.steepness = 10.0  # k and z_0 of the sigmoid; lost in the paper's text
    config.bec.centre = 0.5
    config.orthogonality = ConfigDict({"images": 512})  # of each kind, in batches of 128
    config.linearity = ConfigDict({"images": 64})
    config.path = ConfigDict({"points": 6})
    config.features = ConfigDict({"images": 300})
    return config


def tune_as_long(config: ConfigDict) -> None:
    """Lets FT and Neural Cleanse's unlearning take as many epochs as the other defences, until they are set themselves."""
    for name in ("ft", "nc"):
        config.defense[name].epochs = config.defense.get_ref("epochs") + 0


def defense() -> ConfigDict:
    """Settings of the defences; each takes those that its `purify` names."""
    config = ConfigDict()
    config.name = "bibau_u"  # the main defence, a file in bibau_jax/defenses; its model is `purified` in the record
    config.beside = "ft,base_at,bibau_t,ibu"  # run beside it on the same model and data; ibu is the ideal, no defence
    config.epochs = 20
    config.batch_size = 256
    config.learning_rate = 0.01
    config.schedule = "cosine"
    config.momentum = 0.9
    config.weight_decay = 5e-4
    config.cutout = 0  # of FT: pixels a side of a black square in each image, 0 for none
    config.max_grad_norm = 5.0  # BI-BAU clips the gradient's global norm at this; 0 for never

    config.max_loss = 0.0  # points of held-out clean accuracy that purification may cost; 0 for any
    config.max_seconds = 0.0  # of whole epochs that a defence may train for; 0 for all of them

    config.ibu = ConfigDict({"lambda_clean": 1.0, "lambda_backdoor": 1.0})  # lambda_c, lambda_b; lost in the paper's text

    # BI-BAU; base_at shares the perturbation
    config.target_label = 0  # the class that bibau_t takes for the attacker's; below 0: the one that the scan suspects
    config.ablation = "+A+B"  # base_at, +A, +B or +A+B (Table 6)
    config.pgd = ConfigDict()
    config.pgd.norm = "l2"  # or linf, l1 (few values, moved far); lost in the paper's text
    config.pgd.epsilon = 25.0  # bound on the perturbation, pixels 0..255
    config.pgd.step_size = 2.0
    config.pgd.steps = 20
    config.pgd.start = "zero"  # or random
    config.pgd.block = 1  # above 1, every second image is moved in squares of so many pixels a side, so many times as far
    config.pgd.aimed = 0.0  # target unknown: share of images, 0 to 1, that are to look like target_label, if one is suspected
    config.pgd.fooled = 0.0  # share of clean images that must fool the suspicious model, bound and step growing until they do
    config.lambda_kd = 1.0  # lambda_1, the distillation term of the E-step (A)
    config.lambda_prior = 1.0  # lambda_2, the backdoor-feature prior of the E-step (B)
    config.lambda_ewc = 0.1  # lambda_3, EWC (A); at 1 it holds on to the backdoor too
    config.lambda_iewc = 10.0  # lambda_4, inverse EWC (B)
    config.alpha = 0.5  # share of the soft targets in the distillation, 0..1
    config.temperature = 4.0  # T of the distillation
    config.eta = 0.5  # share of the clean feature that the prior takes off, 0..1
    config.prior_form = "cosine"  # or inner
    config.balance = 0.0  # above 0: both models' gradients of the E-step at length 1, the purified one's times this
    config.softened = 0.0  # share of the M-step's labels that is the suspicious model's answer to x; costs less, leaves more
    config.attack_form = "cross_entropy"  # in the E-step; or margin, which does not vanish where the model is sure of itself
    config.iewc_cap = 100.0  # c: the inverse penalty wakes when its quadratic form passes 1/c
    config.iewc_form = "clip"  # the paper's; or neg_log, hinge
    config.unlearning_labels = "predicted"  # labels that F^u is taken for: the backdoored model's own, or true
    config.fisher_refresh = "epoch"  # F^cl anew at the current parameters each epoch; or never
    config.fisher_chunk = 32  # per-example gradients held at a time on a device

    # The others, each with its authors' settings; what a section lacks is taken from above
    config.ft = ConfigDict({"epochs": 100})  # BackdoorBench's, as nc's in unlearning
    config.nc = ConfigDict({"inversion_epochs": 80, "inversion_rate": 0.1, "limit": 2.0})  # limit of the anomaly index
    config.nc.epochs = 100
    config.nc.at_most = 0.0  # of the median mask's size, for a mask to be flagged; 0 as in the paper: any
    config.nc.share = 0.2  # of the clean images that carry the inverted trigger in unlearning
    config.nc.enough = 0.99  # share of images that a trigger must send to its class
    config.nc.patience = 5  # epochs before the mask's weight changes
    config.nc.stop_after = 25  # epochs without a smaller mask
    config.nc.memory = 8.0  # GiB: as many classes are searched together as take about this much; 0 for all
    config.bti_dbf = ConfigDict({"rounds": 5, "epochs": 30, "batch_size": 128, "learning_rate": 1e-4})
    config.bti_dbf.pretrain_epochs = 50  # of the generator
    config.bti_dbf.mask_epochs = 20
    config.bti_dbf.generator_epochs = 30
    config.bti_dbf.width = 32  # channels of the generator at full size
    config.bti_dbf.generator_rate = 1e-3
    config.bti_dbf.mask_rate = 0.01
    config.bti_dbf.share = 0.1  # of a batch that is replaced by reversed images
    config.pam = ConfigDict(config.bti_dbf.to_dict() | {"rounds": 3, "learning_rate": 0.01, "momentum": 0.1, "share": 0.2})
    config.pam.rho = 0.5  # how far towards the backdoored weights gradients are taken, L2
    config.anp = ConfigDict({"iterations": 2000, "batch_size": 128, "learning_rate": 0.2, "momentum": 0.9})
    config.anp.epsilon = 0.4  # of the noise on scales and biases
    config.anp.noise_steps = 1
    config.anp.alpha = 0.2  # share of the loss without noise
    config.anp.threshold = 0.0  # of the masks; 0 takes the largest that costs at most max_loss of held-out clean accuracy
    config.anp.max_loss = 0.02
    config.rnp = ConfigDict({"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4, "max_grad_norm": 20.0})
    config.rnp.unlearn_epochs = 20
    config.rnp.unlearn_rate = 0.01
    config.rnp.unlearned = 0.2  # accuracy at which unlearning ends
    config.rnp.recover_epochs = 20
    config.rnp.recover_rate = 0.2
    config.rnp.alpha = 0.2  # scale of the recovering loss
    config.rnp.threshold = 0.0  # as for anp
    config.rnp.max_loss = 0.02
    config.clp = ConfigDict({"u": 3.0})  # standard deviations above a layer's mean
    config.ep = ConfigDict({"images": 500, "width": 0.01, "u": 3.0, "zero_bias": False})  # bins' width; prune biases too
    config.bnp = ConfigDict({"images": 500, "u": 3.0})
    config.i_bau = ConfigDict({"epochs": 5, "batch_size": 100, "learning_rate": 1e-3})
    config.i_bau.inner_rate = 10.0  # of the perturbation's ascent, 0..1 scale
    config.i_bau.map_rate = 0.1  # of the map whose fixed point the hypergradient takes
    config.i_bau.penalty = 1e-3
    config.i_bau.radius = 10.0  # of the perturbation, L2 on the 0..1 scale; 0 for none
    config.i_bau.share = 0.01  # of a batch's images that carry it
    config.i_bau.terms = 5  # of the Neumann series
    config.i_bau.amsgrad = False  # BackdoorBench's form of Adam; with it a learning rate of 1e-4, batches of 256
    config.sau = ConfigDict({"epochs": 100, "batch_size": 256, "learning_rate": 1e-4})
    config.sau.epsilon = 51.0  # l-infinity, 0..255
    config.sau.step_size = 51.0
    config.sau.steps = 5
    config.sau.lambda_adversarial = 0.01
    config.sau.lambda_shared = 1.0
    config.sau.lambda_unlearning = 1.0
    config.sau.train_mode = False  # BatchNorm on batch statistics in the update
    config.sau.clip = True  # keep images within 0..255; the authors' code does not
    config.nad = ConfigDict({"epochs": 20, "batch_size": 64, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4})
    config.nad.teacher_epochs = 10
    config.nad.teacher_rate = 0.01
    config.nad.betas = (500.0, 1000.0, 1000.0)  # of the last stages' attention maps
    config.nad.drops = (2, 20)  # epochs after which the rate falls to a tenth
    config.nad.cutout = 9  # pixels a side of the black square in each image; 3 in the authors' code
    return config
