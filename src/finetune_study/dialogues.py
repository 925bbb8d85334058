"""A seeded generator of messenger dialogues with summaries, in the shape of Samsum; every sentence is our own.

The same seed gives the same dialogues everywhere: only `random.Random(seed).random()` is used, whose sequence Python
guarantees across versions; `choice`, `shuffle` and the like carry no such promise.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from finetune_study.errors import DataError

MAX_PIECES = 108
"""Longest dialogue with its summary, as `_pieces` counts: with the prompt at most 125 tokens of SmolLM2 in 60,000 draws,
so that all fit in a context of 128."""

NAMES: tuple[tuple[str, str], ...] = (
    *((name, "she") for name in ("Anna", "Mia", "Julia", "Sara", "Emma", "Kate", "Lily", "Rose", "Ruth", "Grace")),
    *((name, "she") for name in ("Maria", "Laura", "Alice", "Helen", "Jane", "Olivia", "Lucy", "Rosa", "Emily", "Sarah")),
    *((name, "he") for name in ("Tom", "Ben", "Leo", "Paul", "Max", "Adam", "Peter", "Omar", "Sam", "Daniel")),
    *((name, "he") for name in ("Mark", "Luke", "Jack", "Simon", "David", "Frank", "Robert", "Ivan", "Henry", "Carl")),
)
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}

OPENINGS = ("Hi {b}!", "Hey!", "Hey {b}", "Hello {b}, got a minute?", "{b}, are you there?", "Hi, how are you?")
REPLIES = ("Hi {a}", "Hey, what's up?", "Hello!", "Yes, what is it?", "Hi! All good?", "Sure, tell me")
THANKS = (
    ("Thanks a lot!", "No problem"),
    ("You're the best", "I know :)"),
    ("Okay, thank you", "Any time"),
    ("Good to know, thanks", "See you"),
)
"""Said by the one who asked."""
GOODBYES = (
    ("Talk later", "Bye!"),
    ("See you then", "See you"),
    ("Have to go now", "Take care"),
    ("My bus is here, bye", "Bye bye"),
    ("Back to work now", "Same here"),
)


@dataclass(frozen=True)
class Ending:
    """One way in which a scene goes on, with the summaries that then hold."""

    turns: tuple[tuple[str, ...], ...]
    """Messages in order, each in several wordings; the speaker stands before the first bar."""
    summaries: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """What two people write about: {a} asks, {b} answers; the other words in braces are drawn from `slots`."""

    slots: dict[str, tuple[str, ...]]
    turns: tuple[tuple[str, ...], ...]
    endings: tuple[Ending, ...]


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TIMES = ("at 5", "at 6", "at 7", "at 8", "at noon", "after work", "in the evening", "at half past six")

SCENES: tuple[Scene, ...] = (
    Scene(
        slots={
            "what": ("go swimming", "play tennis", "go for a run", "see the new exhibition", "go climbing", "have coffee"),
            "day": DAYS,
            "time": TIMES,
            "other": ("next week", "on the weekend", "tomorrow", "another day"),
            "why": ("working late", "visiting my parents", "seeing the dentist", "looking after my niece"),
        },
        turns=(("a|Do you want to {what} on {day}?", "a|Shall we {what} on {day}?", "a|I'd like to {what} on {day}. Join me?"),),
        endings=(
            Ending(
                (("b|Sure, when?", "b|Love to! What time?"), ("a|{time}?", "a|How about {time}?"), ("b|Perfect", "b|Works for me")),
                ("{a} and {b} will {what} on {day} {time}.", "{b} agrees to {what} with {a} on {day} {time}."),
            ),
            Ending(
                (("b|I can't, I'm {why}", "b|Sorry, I'm {why} then"), ("a|Then {other}?", "a|Maybe {other}?"), ("b|Yes, gladly", "b|Deal")),
                ("{b} can't {what} on {day}, so {a} and {b} will do it {other}.", "{a} and {b} will {what} {other}, as {b} has no time on {day}."),
            ),
        ),
    ),
    Scene(
        slots={
            "item": ("umbrella", "scarf", "charger", "wallet", "phone", "notebook", "jacket", "water bottle"),
            "spot": ("under the sofa", "in the kitchen", "behind the door", "on the balcony", "next to the bed", "in my car"),
            "day": DAYS,
            "where": ("the gym", "the office", "the cafe", "the library", "the train"),
        },
        turns=(
            ("a|Did I leave my {item} at your place?", "a|I can't find my {item}. Is it at yours?", "a|Have you seen my {item}?"),
            ("b|Let me look", "b|Wait, I'll check", "b|One moment"),
        ),
        endings=(
            Ending(
                (("b|Found it, it was {spot}", "b|Here it is, {spot}!"), ("a|Phew! Can I get it on {day}?", "a|Great, I'll pick it up on {day}")),
                ("{b} found {a}'s {item} {spot}. {a} will pick it up on {day}.", "{a}'s {item} was {spot} at {b}'s place and {a} will get it on {day}."),
            ),
            Ending(
                (("b|No, it isn't here", "b|Sorry, I don't see it"), ("a|Then it must be at {where}", "a|Maybe I left it at {where}")),
                ("{a} lost {a_his} {item}. It isn't at {b}'s place, so it may be at {where}.", "{b} can't find {a}'s {item}. {a} thinks it is at {where}."),
            ),
        ),
    ),
    Scene(
        slots={
            "dish": ("lasagna", "curry", "pizza", "mushroom soup", "tacos", "dumplings", "fish"),
            "day": DAYS,
            "bring": ("a salad", "some wine", "dessert", "bread and cheese", "a cake", "ice cream"),
            "no": ("meat", "milk", "nuts", "garlic", "eggs"),
            "instead": ("vegetable stew", "rice with beans", "pasta with tomatoes", "baked potatoes"),
        },
        turns=(("a|I'm cooking {dish} on {day}. Will you come?", "a|Dinner at mine on {day}? I'm making {dish}"),),
        endings=(
            Ending(
                (("b|With pleasure! What can I bring?", "b|Yes! Do you need anything?"), ("a|Maybe {bring}?", "a|{bring} would be nice")),
                ("{a} invites {b} for {dish} on {day}. {b} will bring {bring}.", "{b} will come to {a}'s dinner on {day} and bring {bring}."),
            ),
            Ending(
                (("b|I'd love to, but I don't eat {no}", "b|Happy to come, only no {no} for me"), ("a|Then I'll make {instead}", "a|No worries, {instead} it is")),
                ("{b} doesn't eat {no}, so {a} will make {instead} on {day}.", "{a} will cook {instead} instead of {dish} on {day} because {b} eats no {no}."),
            ),
        ),
    ),
    Scene(
        slots={
            "doc": ("report", "budget", "slides", "contract", "draft", "survey"),
            "boss": ("the client", "the boss", "the whole team", "the accountant"),
            "when": ("by noon", "before lunch", "tonight", "tomorrow morning", "by Friday", "in an hour"),
            "part": ("the last chart", "the summary", "two tables", "the cover page", "the numbers for May"),
        },
        turns=(("a|Is the {doc} ready? {boss_} is asking for it", "a|{boss_} needs the {doc}. How far are you?"),),
        endings=(
            Ending(
                (("b|Only {part} missing", "b|Almost, I still need {part}"), ("a|When can I have it?", "a|So when?"), ("b|You'll get it {when}", "b|I'll send it {when}")),
                ("{b} still has to finish {part} of the {doc} and will send it to {a} {when}.", "{a} needs the {doc} for {boss}. {b} will send it {when}."),
            ),
            Ending(
                (("b|I sent it yesterday", "b|It's in your inbox since yesterday"), ("a|Oh, it was in the spam folder!", "a|Found it, sorry, I missed it")),
                ("{a} asks for the {doc}, but {b} already sent it yesterday.", "{b} sent the {doc} yesterday and {a} had missed it."),
            ),
        ),
    ),
    Scene(
        slots={
            "city": ("Berlin", "Paris", "Rome", "London", "Madrid", "Boston", "Chicago"),
            "late": ("20 minutes", "half an hour", "40 minutes", "an hour", "two hours"),
            "spot": ("in the cafe", "at platform 3", "in the car", "at the main exit", "by the clock"),
            "how": ("a taxi", "the bus", "the night tram", "a bike"),
        },
        turns=(
            ("a|My train from {city} is {late} late", "a|Bad news, the {city} train is {late} late", "a|I'm stuck, the train from {city} has {late} delay"),
        ),
        endings=(
            Ending(
                (("b|Don't worry, I'll wait {spot}", "b|No problem, I'm {spot}"), ("a|Sorry about that", "a|You don't have to, but thanks")),
                ("{a}'s train from {city} is {late} late. {b} will wait {spot}.", "{b} will wait for {a} {spot}, as the train from {city} is {late} late."),
            ),
            Ending(
                (("b|Oh no, I can't stay that long", "b|I have to leave before that"), ("a|It's fine, I'll take {how}", "a|Then I'll take {how} home")),
                ("{a}'s train is {late} late and {b} can't wait, so {a} will take {how}.", "{a} will take {how}, because {b} can't wait for the late train from {city}."),
            ),
        ),
    ),
    Scene(
        slots={
            "ill": ("a cold", "a fever", "a sore throat", "a headache", "the flu"),
            "event": ("class", "choir practice", "the meeting", "the party", "training", "the lecture"),
            "bring": ("some soup", "oranges", "tea and honey", "medicine", "fresh bread"),
            "day": ("today", "tomorrow", "tonight"),
        },
        turns=(("a|I have {ill}, so I won't be at {event} {day}", "a|Not coming to {event} {day}, I've got {ill}"),),
        endings=(
            Ending(
                (("b|Poor you! Shall I bring you {bring}?", "b|Get well soon! Do you want {bring}?"), ("a|That would be so kind", "a|Oh yes, please")),
                ("{a} has {ill} and will miss {event} {day}. {b} will bring {a_him} {bring}.", "{b} will bring {bring} to {a}, who is ill and can't come to {event}."),
            ),
            Ending(
                (("b|Rest well, I'll tell the others", "b|Stay in bed, I'll let everyone know"), ("a|And take notes for me?", "a|Could you take notes?"), ("b|Of course", "b|Will do")),
                ("{a} will miss {event} {day} because of {ill}. {b} will tell the others and take notes.", "{b} will take notes at {event} for {a}, who has {ill}."),
            ),
        ),
    ),
    Scene(
        slots={
            "who": ("Dad", "Mum", "Grandma", "Grandpa", "Aunt May", "Uncle Joe", "Coach"),
            "gift": ("a cookbook", "a plant", "headphones", "a board game", "a warm blanket", "concert tickets"),
            "other": ("a voucher", "a photo album", "flowers", "a good pen"),
            "price": ("20", "30", "40", "50", "60"),
            "had": ("already has one", "never uses such things", "got that last year"),
        },
        turns=(
            ("a|What do we give {who} for the birthday?", "a|Any idea for {who}'s birthday?"),
            ("b|{gift}, maybe?", "b|I thought of {gift}", "b|How about {gift}?"),
        ),
        endings=(
            Ending(
                (("a|Good idea! How much is it?", "a|I like it. What does it cost?"), ("b|{price} dollars, we can share", "b|About {price}, half each")),
                ("{a} and {b} will share the cost of {gift} for {who}'s birthday.", "{a} and {b} will buy {gift} for {who} for {price} dollars together."),
            ),
            Ending(
                (("a|No, {who} {had}", "a|Hm, {who} {had}"), ("b|Then {other}", "b|Okay, {other} instead?"), ("a|Yes, that's better", "a|Perfect")),
                ("{who} {had}, so {a} and {b} choose {other} instead of {gift}.", "{a} and {b} will give {who} {other} for the birthday."),
            ),
        ),
    ),
    Scene(
        slots={
            "pet": ("cat", "dog", "rabbit", "parrot", "hamster"),
            "city": ("Vienna", "Oslo", "Lisbon", "Prague", "Dublin", "Athens"),
            "span": ("this weekend", "next week", "for three days", "over the holidays", "until Sunday"),
            "key": ("with the neighbour", "in the mailbox", "under the mat", "at the bakery"),
            "sub": ("my sister", "my flatmate", "my neighbour", "my aunt"),
        },
        turns=(("a|I'm in {city} {span}. Could you feed my {pet}?", "a|Can you look after my {pet} {span}? I'll be in {city}"),),
        endings=(
            Ending(
                (("b|Sure, where is the key?", "b|Happy to! How do I get in?"), ("a|The key is {key}", "a|I'll leave the key {key}")),
                ("{b} will feed {a}'s {pet} while {a} is in {city}. The key is {key}.", "{a} is in {city} {span} and {b} will look after the {pet}."),
            ),
            Ending(
                (("b|I'm away too, but I can ask {sub}", "b|I can't, sorry. Shall I ask {sub}?"), ("a|That would help a lot", "a|Yes please!")),
                ("{b} can't feed {a}'s {pet} {span}, but will ask {b_his} {sub_}.", "{a} is going to {city}. {b} will ask {b_his} {sub_} to feed the {pet}."),
            ),
        ),
    ),
    Scene(
        slots={
            "thing": ("laptop", "washing machine", "bike", "printer", "heater", "coffee machine", "dishwasher"),
            "fault": ("won't start", "makes a strange noise", "stopped working", "smells of smoke", "is broken again"),
            "day": DAYS,
            "shop": ("on Main Street", "near the station", "behind the school", "next to the bank"),
        },
        turns=(("a|My {thing} {fault}. Any advice?", "a|Help, my {thing} {fault}!", "a|My {thing} {fault}, what should I do?"),),
        endings=(
            Ending(
                (("b|I can have a look on {day}", "b|Let me come over on {day}"), ("a|You're a hero", "a|That would be great")),
                ("{a}'s {thing} {fault}. {b} will have a look at it on {day}.", "{b} will come on {day} to look at {a}'s {thing}."),
            ),
            Ending(
                (("b|Don't touch it, call a repair shop", "b|Better take it to a shop"), ("a|Which one?", "a|Do you know one?"), ("b|The one {shop} is good", "b|Try the one {shop}")),
                ("{a}'s {thing} {fault}. {b} recommends the repair shop {shop}.", "{b} tells {a} to take the {thing} to the shop {shop}."),
            ),
        ),
    ),
    Scene(
        slots={
            "load": ("a sofa", "a piano", "two wardrobes", "a fridge", "twelve boxes", "a big table"),
            "day": DAYS,
            "floor": ("the second floor", "the third floor", "the fifth floor", "the basement"),
            "helper": ("my brother", "two friends", "a colleague", "my cousin"),
            "pay": ("pizza", "beer", "lunch", "cake"),
        },
        turns=(("a|Can you help me carry {load} to {floor} on {day}?", "a|I'm moving on {day} and need help with {load}"),),
        endings=(
            Ending(
                (("b|Sure, I'll bring {helper} as well", "b|Okay, and I'll ask {helper} too"), ("a|Wonderful, {pay} is on me", "a|There will be {pay} for all")),
                ("{b} will help {a} carry {load} on {day} and bring help. {a} pays for the {pay}.", "{a} is carrying {load} on {day}. {b} will help and get {pay}."),
            ),
            Ending(
                (("b|My back hurts, I can't lift things", "b|I hurt my arm, I can't carry that"), ("a|Oh! Could I borrow your van?", "a|And may I use your van?"), ("b|Yes, take it", "b|Sure")),
                ("{b} can't carry things, but {b_he} will lend {a} {b_his} van on {day}.", "{a} needs help with {load} on {day}. {b} can't lift but lends {b_his} van."),
            ),
        ),
    ),
    Scene(
        slots={
            "subject": ("maths", "history", "biology", "French", "physics", "chemistry"),
            "topic": ("chapter 3", "chapter 7", "the last lesson", "the homework", "exercise 5"),
            "place": ("the library", "my place", "the school cafe", "the park"),
            "day": DAYS,
        },
        turns=(("a|Do you understand {topic} in {subject}?", "a|I don't get {topic} in {subject}, do you?"),),
        endings=(
            Ending(
                (("b|Yes, I can explain it on {day}", "b|I do. Let's study on {day}"), ("a|Where?", "a|Where shall we meet?"), ("b|{place}?", "b|At {place}")),
                ("{b} will explain {topic} in {subject} to {a} on {day}.", "{a} doesn't understand {subject}. {b} will help on {day}, meeting at {place}."),
            ),
            Ending(
                (("b|Not at all, and the test is on {day}", "b|No! And we have a test on {day}"), ("a|Let's ask the teacher", "a|We should ask the teacher")),
                ("{a} and {b} don't understand {topic} in {subject} and will ask the teacher.", "{a} and {b} have a {subject} test on {day} and need the teacher's help."),
            ),
        ),
    ),
    Scene(
        slots={
            "band": ("the jazz trio", "the rock band", "the choir", "the string quartet", "the comedy show"),
            "day": DAYS,
            "price": ("15", "25", "35", "45", "55"),
            "row": ("row 2", "row 5", "row 9", "row 12", "the balcony"),
            "next": ("in March", "in June", "in autumn", "next year"),
        },
        turns=(("a|Are there still tickets for {band} on {day}?", "a|Could you get us tickets for {band} on {day}?"),),
        endings=(
            Ending(
                (("b|Got two in {row} for {price} each", "b|Yes, {row}, {price} dollars each"), ("a|I'll pay you back on {day}", "a|I'll send you the money tonight")),
                ("{b} has tickets for {band} on {day} at {price} dollars each. {a} will pay {b_him} back.", "{a} and {b} will see {band} on {day} from {row}."),
            ),
            Ending(
                (("b|Sold out, sorry", "b|No, they are all gone"), ("a|What a pity", "a|Oh no!"), ("b|They play again {next}", "b|There's another one {next}")),
                ("The tickets for {band} on {day} are sold out, but there is another show {next}.", "{a} wanted to see {band}. It is sold out, but they are back {next}."),
            ),
        ),
    ),
    Scene(
        slots={
            "shop": ("the market", "the supermarket", "the bakery", "the corner shop"),
            "one": ("milk", "apples", "rice", "butter", "onions", "coffee"),
            "two": ("cheese", "tomatoes", "flour", "bananas", "eggs", "honey"),
            "sub": ("yogurt", "oranges", "bread", "cream", "carrots"),
        },
        turns=(("b|I'm at {shop}, do we need anything?", "b|At {shop} now. What should I buy?"), ("a|{one} and {two}, please", "a|Yes, {one} and {two}")),
        endings=(
            Ending(
                (("b|There is no {two_}, only {sub}", "b|They have no {two_}. Shall I take {sub}?"), ("a|Then take {sub}", "a|Okay, {sub} is fine")),
                ("{b} is at {shop}. {b_he_} will buy {one} and, as there is no {two_}, {sub}.", "{b} will buy {one} and {sub}, because {shop} has no {two_}."),
            ),
            Ending(
                (("b|Got both. Anything else?", "b|Have them. Is that all?"), ("a|Some {sub}, if you can carry it", "a|And {sub}, please")),
                ("{b} is at {shop} and will buy {one}, {two} and {sub}.", "{a} asks {b} to buy {one}, {two} and {sub}."),
            ),
        ),
    ),
    Scene(
        slots={
            "job": ("the bank", "the museum", "the hospital", "the school", "the newspaper", "the design studio"),
            "start": ("in May", "next month", "on Monday", "in September", "after the holidays"),
            "treat": ("dinner", "drinks", "a cake", "lunch"),
            "reason": ("more experience", "someone with a degree", "better French", "someone full time"),
        },
        turns=(
            ("b|How was the interview at {job}?", "b|Any news from {job}?"),
            ("a|They just called me!", "a|I got the answer today", "a|They wrote an hour ago"),
            ("b|And?", "b|Tell me!", "b|So?"),
        ),
        endings=(
            Ending(
                (("a|I got the job and start {start}!", "a|They took me! I start {start}"), ("b|Congratulations! {treat_} is on me", "b|So proud! I owe you {treat}")),
                ("{a} got the job at {job} and starts {start}. {b} will pay for {treat}.", "{a} will start to work at {job} {start} and {b} congratulates {a_him}."),
            ),
            Ending(
                (("a|No luck, they wanted {reason}", "a|They said no, they need {reason}"), ("b|I'm sorry. Let's have {treat} together", "b|Their loss! Come over for {treat}")),
                ("{a} didn't get the job at {job}, as they wanted {reason}. {b} offers {a_him} {treat}.", "{job_} turned {a} down because they wanted {reason}."),
            ),
        ),
    ),
    Scene(
        slots={
            "noise": ("drums", "loud music", "a barking dog", "drilling", "a party"),
            "when": ("every night", "at midnight", "since six in the morning", "again", "all weekend"),
            "do": ("write to the landlord", "ring their bell", "leave a note", "call the office"),
            "cause": ("my cousins", "the workers upstairs", "my new flatmate", "my kids"),
        },
        turns=(("a|Do you hear it too? {noise_} {when}!", "a|{noise_} {when}, I can't sleep"),),
        endings=(
            Ending(
                (("b|Yes, it's awful", "b|I do, and I hate it"), ("a|What can we do?", "a|Ideas?"), ("b|Let's {do} together", "b|I'd say we {do}")),
                ("{a} and {b} are annoyed by {noise} and will {do}.", "There is {noise} {when}, so {a} and {b} decide to {do}."),
            ),
            Ending(
                (("b|Oh, sorry, that's {cause}", "b|I'm afraid that is {cause}"), ("a|Could it stop by ten?", "a|Please ask them to stop"), ("b|I'll see to it", "b|I promise")),
                ("{a} complains about {noise}. {b} says sorry and promises that it will stop.", "The noise comes from {b}'s side and {b_he} promises {a} to stop it."),
            ),
        ),
    ),
    Scene(
        slots={
            "goal": ("the airport", "the station", "the hospital", "the harbour", "the stadium"),
            "day": DAYS,
            "hour": ("at 4", "at 6", "at 9", "before sunrise", "around noon"),
            "alt": ("the bus", "a taxi", "the metro", "the early train"),
            "why": ("in the garage", "at the repair shop", "sold", "out of gas", "broken"),
        },
        turns=(("a|Could you drive me to {goal} on {day} {hour}?", "a|I have to be at {goal} on {day} {hour}. Can you drive me?"),),
        endings=(
            Ending(
                (("b|Yes, I'll pick you up", "b|Sure, be ready in time"), ("a|I'll pay for the gas", "a|Coffee is on me then")),
                ("{b} will drive {a} to {goal} on {day} {hour}.", "{a} needs to be at {goal} on {day} {hour} and {b} will drive {a_him}."),
            ),
            Ending(
                (("b|My car is {why}, sorry", "b|I can't, the car is {why}"), ("a|Okay, I'll take {alt}", "a|Then it's {alt} for me")),
                ("{b} can't drive {a} to {goal}, as {b_his} car is {why}. {a} will take {alt}.", "{a} will take {alt} to {goal} on {day}, because {b}'s car is {why}."),
            ),
        ),
    ),
    Scene(
        slots={
            "kind": ("book", "podcast", "series", "film", "game"),
            "about": ("a lighthouse", "two spies", "a lost island", "a chess club", "life on Mars", "an old hotel"),
            "verdict": ("funny", "slow but deep", "scary", "so clever", "really moving"),
            "until": ("tonight", "on the weekend", "on the train", "on holiday"),
        },
        turns=(("a|Can you recommend a {kind}?", "a|I need a new {kind}. Any tips?"), ("b|There's one about {about}, it's {verdict}", "b|Try the one about {about}. It is {verdict}")),
        endings=(
            Ending(
                (("a|Sounds good, I'll start {until}", "a|I'll try it {until}"),),
                ("{b} recommends a {kind} about {about}. {a} will try it {until}.", "{a} will start the {kind} about {about} {until}, as {b} finds it {verdict}."),
            ),
            Ending(
                (("a|I know that one, I didn't like it", "a|Oh, I gave up on it"), ("b|Really? I loved it", "b|Strange, all my friends love it")),
                ("{b} recommends a {kind} about {about}, but {a} knows it and didn't like it.", "{a} didn't like the {kind} about {about} that {b} finds {verdict}."),
            ),
        ),
    ),
    Scene(
        slots={
            "count": ("three", "four", "six", "eight", "ten"),
            "place": ("the Greek place", "the noodle bar", "the grill house", "the sushi bar", "the old inn"),
            "day": DAYS,
            "time": TIMES,
            "other": ("the Indian place", "the pizzeria", "the beer garden", "the steak house"),
        },
        turns=(("a|Did you book {place} for {day}?", "a|Do we have a table at {place} on {day}?"),),
        endings=(
            Ending(
                (("b|Yes, for {count} people {time}", "b|Done, {count} of us, {time}"), ("a|Well done", "a|Super, I'm hungry already")),
                ("{b} booked a table for {count} at {place} on {day} {time}.", "There is a table for {count} at {place} on {day} {time}."),
            ),
            Ending(
                (("b|They are full, so I took {other}", "b|No table left. I booked {other} instead"), ("a|Fine, I like it there", "a|Even better!")),
                ("{place_} is full on {day}, so {b} booked {other}.", "{b} booked {other} for {day} because {place} had no table."),
            ),
        ),
    ),
)  # fmt: skip

Item = TypeVar("Item")


def generate(num_dialogues: int, seed: int) -> list[dict[str, str]]:
    """Dialogues with summaries, no two equal; the first n are the same however many are asked for.

    Args:
        num_dialogues: how many.
        seed: another seed gives others.

    Returns:
        Rows with `id`, `dialogue` (lines "Name: text" joined by newlines) and `summary`.

    Raises:
        DataError: when so many different ones can't be made.
    """
    found: dict[tuple[str, str], None] = {}
    draws = _draw_for_ever(random.Random(seed))
    while len(found) < num_dialogues:
        fresh = next((pair for pair, _ in zip(draws, range(1000), strict=False) if pair not in found), None)
        if fresh is None:
            raise DataError(
                "The generator has run out of different dialogues",
                where="data.num_dialogues",
                given=num_dialogues,
                allowed=f"up to about {len(found)}",
            )
        found[fresh] = None
    return [
        {"id": f"generated-{seed}-{number}", "dialogue": dialogue, "summary": summary}
        for number, (dialogue, summary) in enumerate(found)
    ]


def _draw_for_ever(source: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        dialogue, summary = _draw(source)
        if _pieces(dialogue) + _pieces(summary) <= MAX_PIECES:
            yield dialogue, summary


def _draw(source: random.Random) -> tuple[str, str]:
    scene = _pick(source, SCENES)
    words = _words(source, scene)
    ending = _pick(source, scene.endings)
    turns = [_pick(source, wordings) for wordings in (*scene.turns, *ending.turns)]
    first, second = ("a", "b") if turns[0].startswith("a") else ("b", "a")
    if source.random() < 0.7:
        swapped = {"a": words[first], "b": words[second]}
        opening, reply = _pick(source, OPENINGS).format(**swapped), _pick(source, REPLIES).format(**swapped)
        turns = [f"{first}|{opening}", f"{second}|{reply}", *turns]
    if source.random() < 0.5:
        speaker, other = ("b", "a") if turns[-1].startswith("a") else ("a", "b")
        closing, answer = _pick(source, THANKS + GOODBYES if speaker == "a" else GOODBYES)
        turns += [f"{speaker}|{closing}", f"{other}|{answer}"]
    dialogue = "\n".join(_line(turn, words) for turn in turns)
    return dialogue, _sentence(_pick(source, ending.summaries), words)


def _words(source: random.Random, scene: Scene) -> dict[str, str]:
    """What stands for each word in braces; `x_` is x at the start of a sentence, or without its "my" or "some"."""
    asker, answerer = _pick_two(source, NAMES)
    words = {slot: _pick(source, choices) for slot, choices in scene.slots.items()}
    for role, (name, pronoun) in (("a", asker), ("b", answerer)):
        subject, dative, possessive = PRONOUNS[pronoun]
        words |= {role: name, f"{role}_he": subject, f"{role}_him": dative, f"{role}_his": possessive}
        words[f"{role}_he_"] = _capital(subject)
    for slot in scene.slots:
        words[f"{slot}_"] = _capital(words[slot])
    if "sub" in scene.slots and words["sub"].startswith("my "):
        words["sub_"] = words["sub"].removeprefix("my ")
    if "two" in scene.slots:
        words["two_"] = words["two"]
    return words


def _line(turn: str, words: dict[str, str]) -> str:
    speaker, text = turn.split("|", 1)
    return f"{words[speaker]}: {_sentence(text, words)}"


def _sentence(text: str, words: dict[str, str]) -> str:
    return _capital(text.format(**words))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _pick(source: random.Random, items: Sequence[Item]) -> Item:
    return items[int(source.random() * len(items))]


def _pick_two(source: random.Random, items: Sequence[Item]) -> tuple[Item, Item]:
    first = int(source.random() * len(items))
    second = int(source.random() * (len(items) - 1))
    return items[first], items[second + (second >= first)]


def _pieces(text: str) -> int:
    """Words, single digits and signs, two more a line: close to what a tokenizer of English makes of a text."""
    return len(re.findall(r"[A-Za-z]+|[0-9]|[^\w\s]", text)) + 2 * text.count("\n")
