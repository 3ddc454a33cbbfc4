"""What the constraint task is about: subjects, each with what it is and three things that it does.

A reply is put together from these by data/generate_constraint_data.py.
"""

from typing import NamedTuple


class Subject(NamedTuple):
    """A subject: "A river is a stream of fresh water that flows to the sea"."""

    name: str  # with its article
    kind: str
    facts: tuple[str, str, str]  # verbs in the third person, with what follows

    @property
    def word(self) -> str:
        """The name without its article."""
        return self.name.partition(" ")[2]


SUBJECTS = [
    Subject("a river", "a stream of fresh water", ("flows to the sea", "carries sand and mud", "turns old mills")),
    Subject("a bee", "a small insect", ("visits many flowers", "makes sweet honey", "lives in a hive")),
    Subject("a clock", "a machine", ("shows the hour", "ticks every second", "hangs on a wall")),
    Subject("a baker", "a person", ("makes fresh bread", "wakes up early", "works with flour")),
    Subject("a tree", "a tall plant", ("grows toward the light", "gives cool shade", "loses leaves in autumn")),
    Subject("a train", "a vehicle", ("runs on steel rails", "stops at stations", "carries many people")),
    Subject("a cat", "a quiet animal", ("catches mice", "sleeps all day", "climbs over fences")),
    Subject("a lamp", "a simple tool", ("lights a dark room", "stands on a desk", "uses little power")),
    Subject("a teacher", "a person", ("explains hard ideas", "reads many papers", "helps young people")),
    Subject("a mountain", "a high place", ("rises above the clouds", "keeps snow in summer", "draws many climbers")),
    Subject("a boat", "a vessel", ("floats on water", "follows the wind", "brings home fish")),
    Subject("a garden", "a piece of land", ("grows red tomatoes", "needs regular rain", "attracts small birds")),
    Subject("a book", "a set of pages", ("tells a long story", "waits on a shelf", "teaches new words")),
    Subject("a horse", "a strong animal", ("runs across fields", "eats dry grass", "pulls heavy carts")),
    Subject("a bridge", "a structure", ("crosses a deep valley", "joins two towns", "bears heavy trucks")),
    Subject("a doctor", "a person", ("treats sick people", "studies for years", "listens with care")),
    Subject("a cloud", "a mass of tiny drops", ("drifts with the wind", "brings cold rain", "hides the sun")),
    Subject("a piano", "an instrument", ("has black and white keys", "fills a hall", "needs careful tuning")),
    Subject("a farmer", "a person", ("plants corn in spring", "feeds the cows", "watches the weather")),
    Subject("a market", "a busy place", ("sells fresh fruit", "opens at sunrise", "smells of spices")),
    Subject("a dog", "a loyal animal", ("guards the house", "chases a ball", "barks at strangers")),
    Subject("a window", "a pane of glass", ("lets in daylight", "keeps out wind", "looks onto a street")),
    Subject("a pilot", "a person", ("flies large planes", "checks every instrument", "talks to the tower")),
    Subject("a forest", "a large group of trees", ("shelters wild animals", "cleans the air", "grows mushrooms")),
    Subject("a spoon", "a small tool", ("stirs hot soup", "lies beside a plate", "holds some sugar")),
    Subject("a lake", "a body of still water", ("mirrors the sky", "freezes in winter", "is home to ducks")),
    Subject("a nurse", "a person", ("cares for patients", "works at night", "gives medicine")),
    Subject("a bicycle", "a light vehicle", ("has two wheels", "needs no fuel", "rolls down hills")),
    Subject("a spider", "a small creature", ("spins a fine web", "waits for flies", "walks on eight legs")),
    Subject("a library", "a calm building", ("lends many books", "closes at night", "welcomes all readers")),
    Subject("a kitchen", "a warm room", ("smells of onions", "holds pots and pans", "feeds a family")),
    Subject("a whale", "a huge animal", ("swims in cold seas", "sings deep songs", "breathes air")),
    Subject("a painter", "a person", ("mixes bright colors", "looks very closely", "sells a picture")),
    Subject("a road", "a strip of ground", ("leads to a village", "bends around hills", "gets wet in rain")),
    Subject("a candle", "a stick of wax", ("burns with a small flame", "melts slowly", "smells of honey")),
    Subject("a coat", "a piece of clothing", ("keeps a person warm", "has deep pockets", "hangs near a door")),
    Subject("an owl", "a bird", ("hunts at night", "turns its head far", "nests in barns")),
    Subject("an island", "a piece of land", ("lies in the sea", "has sandy beaches", "hears the waves")),
    Subject("a tailor", "a person", ("cuts soft cloth", "measures a sleeve", "sews with thread")),
    Subject("a desert", "a dry region", ("gets little rain", "burns at noon", "cools after sunset")),
    Subject("a drum", "an instrument", ("keeps the beat", "makes a loud sound", "stands behind the band")),
    Subject("a camera", "a small machine", ("takes sharp pictures", "fits in a bag", "needs good light")),
    Subject("a fox", "a clever animal", ("digs a den", "hunts rabbits", "has a red tail")),
    Subject("a school", "a place of learning", ("rings a bell", "teaches children", "closes in summer")),
    Subject("a ladder", "a simple tool", ("reaches the roof", "leans on a wall", "folds in half")),
    Subject("a judge", "a person", ("reads the law", "hears both sides", "decides a case")),
    Subject("a rose", "a flower", ("blooms in June", "has sharp thorns", "smells sweet")),
    Subject("a harbor", "a sheltered bay", ("protects small ships", "smells of fish", "wakes before dawn")),
]
