"""The fixed prompts: plain English about the making of salt, of about a thousand tokens.

Each ends with a passage that begins like one before it, which the model then goes on repeating. Its choice of the
next token is then a clear one: the order in which a processor adds up bfloat16 numbers does not decide it.
"""

from __future__ import annotations

PARAGRAPHS = (
    "The old saltern lies where the river meets the sea. A long wall of clay keeps the tide out, and a gate of oak lets"
    " it in twice a month, when the moon is full or new. Behind the wall the water stands in wide and shallow ponds,"
    " and there the wind and the sun begin their slow work.",
    "From pond to pond the water becomes heavier. The keeper of the gates measures it every morning with a small glass"
    " float, writes the number in a book, and decides which of the wooden gates to open. She never hurries. Water that"
    " moves on too early spoils the harvest, and water that waits too long leaves its salt where nobody can rake it.",
    "At the end of its way the water reaches the pans. They are small, square and flat, and each of them belongs to one"
    " family. A low bank of clay runs around every pan, no higher than a hand, and it is the most important thing in"
    " the whole saltern: it keeps the water of one family apart from the water of all the others.",
    "In the first week of summer a thin skin forms on the pans in the evening. It is the finest salt, and it must be"
    " taken before the night wind breaks it. The families walk along the banks with long rakes and draw the skin to the"
    " edge, where it dries until the morning. The coarse salt below it is taken only once a week.",
    "Every family brings its baskets to the store, a long house of dark timber on the only hill. Inside, the floor is"
    " divided by boards into bays, and a name is painted above each of them. The storekeeper knows how much a bay may"
    " hold. When a family brings more than that, its own oldest salt is carried out to make room, and never the salt"
    " of a neighbour.",
    "There was a year in which one family harvested twice as much as all the others. They asked for the empty bays of"
    " those who had been unlucky, and the storekeeper let them have the room as long as nobody needed it. When the"
    " others came back with full baskets, the room was theirs again the same day, for so it had been promised.",
    "The storekeeper keeps a book as well. It does not say what is in the baskets, only how many there are and when"
    " each of them was last asked for. People say that the book is dull. The storekeeper says that a book about other"
    " people's salt should be dull, and that he has never lost a basket.",
    "Once the store burned down in a winter night. Nobody went hungry because of it. The families took fresh water from"
    " the sea, as their grandparents had done, and waited for the sun. It took longer than carrying a basket down the"
    " hill, but the salt was the same salt, and by the summer a new house stood on the hill with new names above its"
    " bays.",
    "Visitors ask why the families do not put all of their salt into one great heap, which would be easier to carry and"
    " easier to count. The old people smile at this. A heap has no owner, they say, and what has no owner is soon"
    " eaten by those who shout the loudest. With a bank of clay around every pan, nobody needs to shout.",
    "The rakes are made in the winter. The handle is of ash, because it bends and does not break, and the blade is of"
    " lime, because it leaves no stain. A good rake serves for ten summers. When its blade is worn down to the width of"
    " two fingers, it is given to the children, who draw lines with it in the sand behind the wall.",
    "Rain is the enemy of the pans. When a dark cloud comes up over the river, somebody rings the bell at the gate, and"
    " everybody runs to open the drains. The fresh water lies on top of the heavy water for a short while, and if it is"
    " let out quickly enough, nothing is lost. If not, the work of a week is gone in a quarter of an hour.",
    "Merchants arrive in September with flat boats. They taste, they frown, and they name a price that is too low. The"
    " families laugh and name one that is too high. By noon they have met in the middle, as they did last year and the"
    " year before, and the boats go down the river in a long line, so deep in the water that their crews sit still.",
    "A stranger once offered to guess, from the time that the storekeeper took to answer, whose bays were full. After"
    " that the storekeeper made it his habit to walk to the end of the house and back for every question, whether there"
    " was anything to look for or not. The stranger left in the same week and has not come back.",
    "In the evening the gates are closed and the ponds lie still. The keeper walks along the wall once more and listens"
    " to the sea on the other side. Then she writes the last number of the day into her book, puts out the lamp, and"
    " leaves the work to the wind, which needs no light.",
)


def _recited(first: int, end: int, *, again: int, words: int) -> str:
    """Join the paragraphs `[first, end)`, and begin paragraph `again` once more with its first `words`."""
    opening = " ".join(PARAGRAPHS[again].split()[:words])
    return "\n\n".join([*PARAGRAPHS[first:end], opening])


# At each of the 16 tokens that follow, the model's first choice is ahead of its second by two in log probability.
STORY = _recited(0, len(PARAGRAPHS), again=2, words=12)
"""The prompt that alice, bob and nobody send."""

OTHER_STORIES = tuple(_recited(first, first + 8, again=7, words=20) for first in (1, 3, 5))
"""Three prompts that share no beginning with the first nor with each other."""

FLOOD = tuple("\n\n".join([*PARAGRAPHS[first:], *PARAGRAPHS[:first]]) for first in range(len(PARAGRAPHS)))
"""As many prompts as there are paragraphs, each beginning with another one: twice what the demo's cache holds."""

SYSTEM_PROMPT = "\n\n".join(["You keep the store of a saltern, and know it by heart.", *PARAGRAPHS[:6]])
"""What an operator publishes: some four blocks of text."""

MESSAGE = "Recite from the beginning: The old saltern lies where the river meets the sea."
"""What users ask first under that system prompt."""
