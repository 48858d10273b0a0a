"""Word lists the demo tasks draw from; all of them are written for this project.

The lists are kept small on purpose: a byte-level BPE of about a thousand entries can then give
most words a token of their own, which keeps the training sequences short.
"""

from __future__ import annotations


def _split(text: str) -> list[str]:
    return text.split()


NAMES = _split(
    "Tom Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Nora Oscar Paul "
    "Rosa Sam Tina Hugo Vera Will Zoe Adam Lucy Max Ella Peter Julia Simon Maria"
)

COLOURS = _split("red blue green yellow black white brown pink grey orange purple silver")

ANIMALS = _split(
    "cat dog fox bear wolf lion tiger horse cow sheep goat pig duck hen owl frog mouse rabbit "
    "snake fish whale bee ant spider monkey turtle"
)

FOODS = _split(
    "apple pear plum lemon cherry banana bread cheese butter honey soup cake rice egg carrot "
    "potato onion bean"
)

THINGS = _split(
    "ball kite book cup hat key lamp pen bag box coin drum rope spoon clock chair table mirror "
    "pencil basket blanket bottle candle umbrella bell ring map shoe coat scarf"
)

PLACES = _split(
    "garden kitchen forest river school market park house barn field tower bridge harbour "
    "library station village castle cellar"
)

VERBS = _split("run walk sing jump swim read write sleep cook dance draw laugh listen climb")

ADJECTIVES = _split(
    "big small old new fast slow hot cold happy sad tall short soft hard clean dark bright "
    "quiet loud kind brave warm"
)

NATURE = _split(
    "sun moon star rain snow wind cloud stone tree leaf flower grass sea hill lake sand"
)

WORDS = tuple(sorted({*COLOURS, *ANIMALS, *FOODS, *THINGS, *PLACES, *VERBS, *ADJECTIVES, *NATURE}))

DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

MONTHS = _split(
    "January February March April May June July August September October November December"
)

OPPOSITES = (
    ("big", "small"), ("old", "new"), ("fast", "slow"), ("hot", "cold"), ("happy", "sad"),
    ("tall", "short"), ("soft", "hard"), ("clean", "dirty"), ("dark", "light"),
    ("quiet", "loud"), ("open", "closed"), ("full", "empty"), ("early", "late"),
    ("left", "right"), ("up", "down"), ("day", "night"), ("black", "white"), ("wet", "dry"),
    ("first", "last"), ("yes", "no"), ("rich", "poor"), ("strong", "weak"), ("high", "low"),
    ("near", "far"), ("inside", "outside"), ("summer", "winter"),
)  # fmt: skip

YOUNG = (
    ("cat", "kitten"), ("dog", "puppy"), ("cow", "calf"), ("sheep", "lamb"), ("horse", "foal"),
    ("bear", "cub"), ("duck", "duckling"), ("frog", "tadpole"), ("hen", "chick"),
    ("pig", "piglet"),
)  # fmt: skip

LEGS = (
    ("cat", "4"), ("dog", "4"), ("horse", "4"), ("cow", "4"), ("spider", "8"), ("bee", "6"),
    ("ant", "6"), ("duck", "2"), ("hen", "2"), ("owl", "2"), ("snake", "0"), ("fish", "0"),
)  # fmt: skip

TYPICAL_COLOURS = (
    ("grass", "green"), ("snow", "white"), ("the sun", "yellow"), ("the sea", "blue"),
    ("a banana", "yellow"), ("a lemon", "yellow"), ("a carrot", "orange"), ("a frog", "green"),
    ("a cherry", "red"), ("the sky", "blue"), ("honey", "golden"), ("a bear", "brown"),
)  # fmt: skip

CATEGORIES = (
    ("an animal", ANIMALS), ("a colour", COLOURS), ("a food", FOODS), ("a place", PLACES),
)  # fmt: skip

SYSTEM_PROMPTS = (
    "You are smelt demo, a small and friendly model.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a careful assistant. Answer with the result only.",
    "Be kind and be short.",
    "Help the user with small tasks.",
)

# Each intent: what a user may say, and the answers that are accepted for it.
SMALL_TALK: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "greet": (
        ("hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening",
         "good day", "hey there", "greetings"),
        ("Hello! How can I help you?", "Hi! What shall we do today?"),
    ),
    "how": (
        ("how are you", "how are you today", "how do you do", "how is it going", "are you well",
         "how do you feel", "how are things", "are you fine"),
        ("I am fine, thank you. How are you?", "I am very well, thank you!"),
    ),
    "who": (
        ("who are you", "what are you", "tell me who you are", "what is your name",
         "do you have a name", "what do they call you", "please introduce yourself"),
        ("I am smelt demo, a very small language model.",),
    ),
    "can": (
        ("what can you do", "what are you good at", "how can you help me", "can you help me",
         "what do you know", "what are your skills", "help"),
        ("I can add numbers, sort lists, spell words and answer questions about a sentence.",),
    ),
    "thanks": (
        ("thank you", "thanks", "thanks a lot", "thank you very much", "many thanks",
         "that was helpful", "great, thank you"),
        ("You are welcome!", "I am glad that I could help."),
    ),
    "bye": (
        ("goodbye", "bye", "bye bye", "see you later", "see you soon", "good night",
         "I have to go", "until tomorrow"),
        ("Goodbye! See you soon.", "Bye! Have a nice day."),
    ),
    "joke": (
        ("tell me a joke", "do you know a joke", "make me laugh", "say something funny",
         "a joke please", "can you tell a joke"),
        ("Why did the clock go to school? It wanted to learn to tell the time.",
         "What did the big hat say to the small hat? You stay here, I go on ahead."),
    ),
    "human": (
        ("are you a human", "are you a person", "are you a robot", "are you real",
         "are you alive", "are you a machine"),
        ("I am a computer program, not a person.",),
    ),
    "made": (
        ("who made you", "where do you come from", "how were you made", "who built you",
         "how did you learn", "who trained you"),
        ("I was trained on generated text by the smelt project.",),
    ),
    "like": (
        ("do you like music", "what do you like", "what is your hobby", "do you have a hobby",
         "what makes you happy", "what do you like to do"),
        ("I like to sort words and to count things.",),
    ),
    "weather": (
        ("how is the weather", "will it rain today", "is it warm outside", "is the sun shining",
         "what is the weather like", "will it snow"),
        ("I cannot see the weather, but I hope that the sun shines.",),
    ),
    "sad": (
        ("I am sad", "I feel bad", "I had a bad day", "I am tired", "I do not feel well",
         "today was hard"),
        ("I am sorry to hear that. I hope you feel better soon.",),
    ),
    "happy": (
        ("I am happy", "I feel good", "I had a good day", "I feel great", "today was great",
         "I am in a good mood"),
        ("That is good to hear!", "I am happy for you!"),
    ),
}  # fmt: skip
