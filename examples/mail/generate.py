"""The demo's data: short shop e-mails, each to be read into a JSON record.

    python examples/mail/generate.py OUT_DIR [--train 192] [--test 300] [--seed 0]

Nothing is downloaded. Training and test share no first name, surname, product, sentence or
greeting, so that a score on the test rows is about reading mails, not about remembering words.
Whatever stands in a record stands in its mail.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

INSTRUCTION = (
    "Read the e-mail into JSON with the keys intent (order, return, cancel or invoice), "
    "customer, product and quantity."
)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

FIRST = {
    "train": (
        "Alice", "Bruno", "Carmen", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Irene", "Jonas",
        "Katrin", "Luis", "Miriam", "Nils", "Olga", "Pablo", "Renata", "Samir", "Teresa", "Ulrich",
        "Vera", "Walter", "Yusuf", "Zofia", "Anders", "Beatriz", "Chloé", "Daniel", "Esther",
        "Felix", "Gina", "Hannah", "Ivan", "Julia", "Karim", "Laura", "Marco", "Nadia", "Oscar",
        "Priya",
    ),
    "test": (
        "Akira", "Bettina", "Cedric", "Dolores", "Emil", "Fatima", "Gustav", "Helga", "Ibrahim",
        "Jasmin", "Kofi", "Lena", "Mateo", "Noor", "Otto", "Paula", "Quentin", "Rosa", "Stefan",
        "Tomás", "Ursula", "Viktor", "Wanda", "Xenia", "Yara", "Zoltan", "Amir", "Birgit",
        "Claudio", "Diana", "Erik", "Flora", "Goran", "Heidi", "Ines", "Jakob", "Keiko", "Leon",
        "Magda", "Naomi",
    ),
}  # fmt: skip
LAST = {
    "train": (
        "Bauer", "Costa", "Dubois", "Eriksen", "Fischer", "Gomez", "Haddad", "Ivanov", "Jensen",
        "Kovacs", "Lopez", "Moreau", "Novak", "Olsen", "Petrov", "Quinn", "Rossi", "Schmidt",
        "Torres", "Ullman", "Vargas", "Weber", "Young", "Zimmer", "Abbott", "Berger", "Clarke",
        "Duarte", "Evans", "Ferrari", "Grant", "Hughes", "Iversen", "Jordan", "Keller", "Lindberg",
        "Martin", "Nguyen", "Ortega", "Palmer",
    ),
    "test": (
        "Adler", "Brandt", "Castillo", "Dvorak", "Engel", "Fontaine", "Garcia", "Hoffmann",
        "Ibsen", "Janssen", "Krüger", "Larsen", "Mendes", "Nakamura", "Okafor", "Pereira",
        "Rahman", "Santos", "Takeda", "Urban", "Vogel", "Winter", "Xu", "Yilmaz", "Zapata",
        "Andersson", "Bianchi", "Chandra", "Delgado", "Eklund", "Farkas", "Greco", "Horvat",
        "Irving", "Jung", "Klein", "Lefebvre", "Marek", "Nilsson", "Osman",
    ),
}  # fmt: skip
PRODUCT = {
    "train": (
        "desk lamp", "oak shelf", "garden hose", "tea kettle", "wool blanket", "paper trimmer",
        "bike pump", "coffee grinder", "steel ladder", "picture frame", "kitchen scale",
        "tool box", "water filter", "floor mat", "wall clock", "hand mixer", "travel mug",
        "camping chair", "label printer", "extension cord", "bread knife", "shower curtain",
        "book stand", "door handle", "plant pot", "laundry basket", "rain jacket", "yoga mat",
        "soldering iron", "cutting board",
    ),
    "test": (
        "reading chair", "copper pan", "leather wallet", "snow shovel", "baby monitor",
        "rice cooker", "power drill", "chess set", "beach towel", "mirror cabinet",
        "phone holder", "salad bowl", "sewing machine", "tent peg", "office stapler",
        "cat tree", "paint roller", "guitar strap", "ice bucket", "key safe", "silk scarf",
        "bird feeder", "drawing tablet", "hiking pole", "candle holder", "air purifier",
        "window blind", "milk jug", "network cable", "pencil case",
    ),
}  # fmt: skip
# {p} product, {q} quantity; for return, cancel and invoice one product may be meant.
BODY = {
    "train": {
        "order": (
            "I would like to order {q} x {p}.",
            "Please send us {q} of the {p} as soon as you can.",
            "We need {q} units of the {p} for our office.",
            "Could you ship {q} of your {p} to my address?",
            "Put me down for {q} of the {p}, please.",
            "I want to buy the {p} from your catalogue, {q} in total.",
        ),
        "return": (
            "I am sending back {q} of the {p}, as the colour is wrong.",
            "The {p} arrived broken and I want my money back for all {q}.",
            "How do I send {q} x {p} back to you? It does not fit.",
            "I am not happy with the {p}. All {q} will go back to you on Monday.",
            "Please take back {q} of the {p}, we received too many.",
            "The {p} does not work, so I will return the {q} that I received.",
        ),
        "cancel": (
            "Please cancel my order of {q} x {p}.",
            "I no longer need the {p}, so stop the order of {q}.",
            "My order for {q} of the {p} was a mistake, do not send it.",
            "We found the {p} elsewhere and withdraw our order of {q}.",
            "Is it too late to call off the {q} of the {p} that I ordered on Friday?",
            "I changed my mind: no {p} after all, forget the {q} that I asked for.",
        ),
        "invoice": (
            "I still need the invoice for {q} of the {p}.",
            "Please send the bill for the {p}, {q} in number, to our accounts department.",
            "The invoice for {q} x {p} shows the wrong address, can you correct it?",
            "Our accountant asks for a receipt for {q} of the {p}.",
            "We were charged twice for {q} of the {p}. Please check the invoice.",
            "Where can I download the invoice for the {p}? I bought {q}.",
        ),
    },
    "test": {
        "order": (
            "I'd be glad to get {q} pieces of the {p} from you.",
            "May I purchase {q} of the {p} that I saw in your shop window?",
            "Our school wishes to have {q} x {p} by next Wednesday.",
            "We would like the {p}. Kindly deliver {q} to the side entrance.",
        ),
        "return": (
            "The {p} is faulty. I'd like to give {q} back and get a refund.",
            "Where should the parcel go if I bring back {q} of the {p}?",
            "You sent me the wrong size of the {p}; all {q} are on their way back to you.",
            "I have no use for {q} of the {p} and wish to hand them back within the 14 days.",
        ),
        "cancel": (
            "Please don't ship the {q} x {p}, I must cancel.",
            "Yesterday I ordered {q} of the {p}; kindly delete that order.",
            "Our project has ended, hence we cancel the {q} pieces of the {p}.",
            "If it has not left yet, scrap my purchase of {q} of the {p}.",
        ),
        "invoice": (
            "A copy of the invoice about {q} of the {p} would help me with my taxes.",
            "The sum on your invoice for {q} x {p} seems too high to me.",
            "Could the bill for our {q} pieces of the {p} carry our VAT number?",
            "I paid for {q} of the {p} but never got an invoice. Could you mail it?",
        ),
    },
}
GREETING = {
    "train": ("Hello,", "Dear team,", "Good morning,", "Hi there,"),
    "test": ("Good day,", "To whom it may concern,", "Greetings,", "Dear Sir or Madam,"),
}
CLOSING = {
    "train": ("Kind regards,\n{n}", "Thanks, {n}", "Best, {n}", "Yours, {n}"),
    "test": ("With best wishes,\n{n}", "Many thanks in advance\n{n}", "Sincerely\n{n}", "- {n}"),
}
ASIDE = {
    "train": ("", "", "My number is 555 0134.", "I am at work until 5 pm.", "Sorry for the rush."),
    "test": ("", "", "You can call 555 0178.", "I'm away from the 12th.", "Hope you are well."),
}


def make_rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` distinct rows of `split` ("train" or "test"), the intents in turn."""
    draw = random.Random(f"{seed} {split}")
    intents = list(BODY[split])
    rows: dict[str, dict[str, str]] = {}
    for attempt in range(100 * count):
        if len(rows) == count:
            break
        intent = intents[len(rows) % len(intents)]
        product = draw.choice(PRODUCT[split])
        quantity = draw.randint(2, 10) if attempt % 3 == 0 else draw.randint(2, 40)
        sentence = draw.choice(BODY[split][intent])
        in_words = quantity <= 10 and "{q} x" not in sentence and draw.random() < 0.5
        said = NUMBERS[quantity - 1] if in_words else str(quantity)
        name = f"{draw.choice(FIRST[split])} {draw.choice(LAST[split])}"
        body = sentence.format(p=product, q=said)
        middle = " ".join(part for part in (body, draw.choice(ASIDE[split])) if part)
        closing = draw.choice(CLOSING[split]).format(n=name)
        mail = f"{draw.choice(GREETING[split])}\n{middle}\n{closing}"
        record = {"intent": intent, "customer": name, "product": product, "quantity": quantity}
        output = json.dumps(record, ensure_ascii=False)
        rows.setdefault(mail, {"instruction": INSTRUCTION, "input": mail, "output": output})
    if len(rows) < count:
        raise ValueError(f"{count} rows are more than there are mails: ask for fewer")
    return list(rows.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write train.jsonl and test.jsonl for the demo.",
        epilog="Example: python examples/mail/generate.py runs/mail --test 300",
    )
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--train", type=int, default=192, help="rows to train on (192)")
    parser.add_argument("--test", type=int, default=300, help="rows to test on (300)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for split, count in (("train", given.train), ("test", given.test)):
        if not 1 <= count <= 20_000:
            print(f"--{split} is {count}: choose 1 to 20000", file=sys.stderr)
            return 2
        lines = [json.dumps(r, ensure_ascii=False) for r in make_rows(split, count, given.seed)]
        given.folder.mkdir(parents=True, exist_ok=True)
        path = given.folder / f"{split}.jsonl"
        temporary = path.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        print(f"{path}: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
