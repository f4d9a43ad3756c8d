"""Write the demo's data: short e-mails to a shop, and the JSON record that each one amounts to.

Reading such mails into records is a task that a small model can learn from a few hundred rows
and that a reader can check at a glance. The mails are put together from the tables below, so
that the same seed gives the same bytes and every value of a record can be read off its mail:
the product is given in the singular, the quantity only where the mail states a number of
pieces, and an order number only where the mail states one.

The test split shares no name, product, order number or sentence with the train split, so its
score says whether a model has learned the task and not the tables.

Python's standard library is all this needs.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

INSTRUCTION = (
    "Extract a JSON record with intent (order, cancel, return, delivery or invoice), customer, "
    "product (singular), quantity and order_no from this e-mail; use null for anything not stated."
)
INTENTS = ("order", "cancel", "return", "delivery", "invoice")
SPLITS = ("train", "test")
WORDS = (15, 45)  # the shortest and the longest mail
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")

FIRST_NAMES = {
    "train": (
        *("Maren", "Søren", "Amélie", "Kwame", "Priya", "Tomasz", "Ingrid", "Mateo", "Yuki"),
        *("Fatima", "Liam", "Zoë", "Hiroshi", "Chidi", "Beatriz", "Anselm", "Leila", "Dmitri"),
        *("Saoirse", "Rajesh", "Élodie", "Wanjiru", "Paolo", "Greta", "Omar", "Nadia", "Henrik"),
        *("Xiulan", "Björn", "Camila", "Tariq", "Margaret", "Jürgen", "Thandiwe", "Lucía"),
        *("Patrick", "Ewa", "Minh", "Gareth", "Ayşe", "Viktor", "Noor", "Isabel", "Kofi"),
    ),
    "test": (
        *("Astrid", "Diego", "Hana", "Emeka", "Sunita", "Piotr", "Chloé", "Youssef", "Rosalind"),
        *("Jun", "Małgorzata", "Oisín", "Teresa", "Lars", "Amina", "Giulia", "Vikram", "Noémie"),
        *("Kenji", "Solveig", "Abena", "Rafael", "Katarina", "Declan", "Mei", "Günther"),
        *("Samira", "Alejandro", "Freya", "Ibrahim", "Wendy", "Jiří", "Sipho", "Inês"),
        *("Bernadette", "Hugo", "Anjali", "Torsten", "Deniz", "Malik", "Ursula", "Nkechi"),
    ),
}
SURNAMES = {
    "train": (
        *("Holt", "Lindqvist", "Okafor", "Sharma", "Kowalski", "Fernández", "Tanaka", "Haddad"),
        *("Murphy", "Janssen", "Mensah", "Almeida", "Richter", "Petrov", "Gallagher", "Iyer"),
        *("Moreau", "Kamau", "Romano", "Schäfer", "Rahman", "Novák", "Dahl", "Chen", "Nyström"),
        *("Vargas", "Siddiqui", "Whitfield", "Köhler", "Dlamini", "Ortiz", "Byrne", "Wójcik"),
        *("Nguyen", "Pritchard", "Yılmaz", "Horvat", "Bakker", "Castillo", "Asante", "Fletcher"),
        *("Laurent", "Sato", "Papadakis"),
    ),
    "test": (
        *("Berglund", "Adeyemi", "Kapoor", "Zieliński", "Navarro", "Watanabe", "Mansour"),
        *("O'Leary", "Visser", "Owusu", "Carvalho", "Baumann", "Sokolov", "Brennan", "Menon"),
        *("Dubois", "Njoroge", "Ricci", "Krüger", "Hossain", "Dvořák", "Halvorsen", "Wang"),
        *("Åkesson", "Mendoza", "Qureshi", "Ashworth", "Nkosi", "Delgado", "Doyle", "Tran"),
        *("Lewandowski", "Llewellyn", "Demir", "Babić", "Mulder", "Ramírez", "Boateng"),
        *("Thackeray", "Girard", "Suzuki", "Nikolaidis"),
    ),
}
# Every plural is the singular with an s, so that the singular is always found in the mail.
PRODUCTS = {
    "train": (
        *("oak stool", "bamboo tray", "copper kettle", "linen curtain", "desk lamp"),
        *("garden hose", "wool blanket", "steel bucket", "leather wallet", "glass vase"),
        *("paper lantern", "coffee grinder", "wall clock", "bread bin", "rubber doormat"),
        *("camping chair", "kitchen timer", "cotton apron", "marble coaster", "picture frame"),
        *("door handle", "yoga mat", "ceramic bowl", "cork pinboard", "fountain pen"),
        *("travel mug", "bicycle pump", "tea strainer", "tool cabinet", "plant stand"),
        *("candle holder", "letter opener", "walking stick", "bird feeder", "pepper mill"),
        *("rain jacket", "file folder", "step ladder", "spice rack", "bath towel"),
    ),
    "test": (
        *("walnut bookcase", "velvet cushion", "brass hook", "silk necktie", "folding table"),
        *("laundry hamper", "soup ladle", "canvas backpack", "wooden spoon", "iron skillet"),
        *("flower pot", "juice carafe", "mountain tent", "sewing kit", "chess set"),
        *("cheese grater", "wicker basket", "ink cartridge", "laptop sleeve", "phone charger"),
        *("cable organiser", "nylon rope", "wine decanter", "egg cup", "bed sheet"),
        *("floor rug", "water bottle", "snow shovel", "lawn rake", "hedge trimmer"),
        *("pencil case", "spiral notebook", "key ring", "dog collar", "fruit platter"),
    ),
}

# A mail is: greeting, [intro], [lead], body, [tail], then a sign-off, or a farewell after an intro.
GREETINGS = {
    "train": ("Hello,", "Hi there,", "Dear team,", "Good morning,", "Dear Sir or Madam,", "Hi,"),
    "test": ("Good afternoon,", "Hey folks,", "Dear customer service,", "To whom it may concern,"),
}
INTROS = {
    "train": (
        "This is {name} from the flower shop.",
        "My name is {name}.",
        "{name} here, from the town library.",
        "This is {name}.",
    ),
    "test": (
        "I am {name}, and I run the café by the station.",
        "You are hearing from {name} today.",
        "{name} speaking for the chess club.",
    ),
}
LEADS = {
    "train": (
        "I hope you are well.",
        "Thank you for the friendly service last time.",
        "It has been raining here since {weekday}.",
        "We met at the trade fair in spring.",
        "I have been a customer for {number} years.",
        "Sorry to bother you again.",
        "I tried to call you {number} times on {weekday}.",
        "We are a small team of {number}.",
    ),
    "test": (
        "Hope your week is going fine.",
        "Great website, by the way.",
        "Your colleague was very kind on the phone last {weekday}.",
        "We run a guest house with {number} rooms.",
        "The sun is out here at last.",
        "I have shopped with you on {number} occasions.",
        "Forgive the late message.",
    ),
}
TAILS = {
    "train": (
        "You can reach me on {phone}.",
        "I am in the office until {number} on {weekday}.",
        "My customer number is {account}.",
        "Please reply by {weekday} if you can.",
        "Our address is still {number} Mill Lane.",
        "Call {phone} if anything is unclear.",
        "I am away for {number} days from {weekday}.",
        "A short reply is enough.",
    ),
    "test": (
        "My mobile is {phone}.",
        "The best time to ring is after {number} on {weekday}s.",
        "Our account with you is {account}.",
        "An answer before {weekday} would help.",
        "We live at {number} Orchard Row now.",
        "If in doubt, ring {phone}.",
        "Let me know what happens next.",
    ),
}
SIGN_OFFS = {
    "train": (
        *("Kind regards,\n{name}", "Best wishes,\n{name}", "Thanks,\n{name}", "{name}"),
        *("Many thanks and regards,\n{name}", "Yours sincerely,\n{name}"),
    ),
    "test": (
        *("All the best,\n{name}", "Cheers,\n{name}", "Warm greetings,\n{name}"),
        *("With appreciation,\n{name}", "Yours faithfully,\n{name}"),
    ),
}
FAREWELLS = {
    "train": ("Thank you very much!", "Many thanks in advance.", "Thanks for your help."),
    "test": ("Much appreciated!", "Speak soon.", "Have a lovely day."),
}

# {items} is "4 oak stools" or "four oak stools", {quantity} "4" or "four", {digits} "4".
BODIES = {
    "train": {
        "order": (
            "I would like to order {items}, please.",
            "Please send us {items} as soon as you can.",
            "Could you put me down for {items}? The usual address is fine.",
            "We need {digits} x {product} for our new branch.",
            "Can I buy {quantity} of the {product} from your catalogue?",
            "Our stock is running low, so please ship {items} to the shop.",
            "I saw the {product} at a friend's house and want to order {quantity} of them.",
            "Please add {items} to my open order {order}.",
            "I want to place an order: {product}, quantity {digits}.",
            "Do you have {items} in stock? If so, I will take them all.",
            "The quote looks good, so we would like to go ahead and buy {items}.",
            "Same again, please: {items}, just like in order {order}.",
            "I would like to order the {product} that you showed in your newsletter.",
            "Please send me the {product} from your window; I will pay by bank transfer.",
        ),
        "cancel": (
            "Please cancel my order {order} for {items}.",
            "I no longer need the {product}, so please cancel order {order}.",
            "The party was called off, so we have to cancel our order of {items}.",
            "Could you stop order {order} before it ships? It was for {items}.",
            "I chose the wrong size by mistake, so please cancel the {product}, order {order}.",
            "Please do not send the {items} we asked for; our budget was cut.",
            "I would like to withdraw my order for the {product}.",
            "Is it still possible to cancel {order}? I ordered {digits} x {product} yesterday.",
            "My husband has already bought the {product} in town, so I want to cancel my order.",
            "Kindly cancel the whole of order {order}, that is {items}.",
            "Cancellation, please: order {order}, {product}, {digits} pieces.",
            "I am afraid we must cancel the {product} from order {order}.",
            "You say that {items} would take six weeks. That is too long, so please cancel.",
            "I have changed my mind about the {product}. Please cancel it before it is packed.",
        ),
        "return": (
            "I would like to return {items} from order {order}.",
            "The {product} arrived damaged. How can I send it back?",
            "In my parcel, order {order}, {items} were broken, and I want to return them.",
            "The {product} from order {order} is bigger than I thought, so I am sending it back.",
            "Please send me a return label for {items}.",
            "How do I send back {quantity} of the {product}? The colour is not right.",
            "We are not happy with the {product} and would like to return it.",
            "Return request: order {order}, {digits} x {product}, wrong colour.",
            "You sent me {items} too many with order {order}; I would like to return them.",
            "The {product} fell apart after a week, so I want to return it for a refund.",
            "Can you collect {items} from us? They do not match the picture and must go back.",
            "Order {order} came today, but the {product} is the wrong size. May I return it?",
            "I would like to give back {items}, unused and still in the box.",
            "Under your 30-day policy I wish to return the {product} from order {order}.",
        ),
        "delivery": (
            "When will order {order} with {items} arrive?",
            "I am still waiting for the {product}. Where is my parcel?",
            "Could you tell me the delivery date for {items}?",
            "Order {order} was due last week, but the {product} has not come yet.",
            "Has the {product} from order {order} been shipped?",
            "The tracking page for {order} shows nothing. When can I expect the {product}?",
            "We ordered {items} two weeks ago and have heard nothing about the delivery.",
            "Where are the {items} from order {order}? Nobody has brought them yet.",
            "Please ask the driver to leave my {product}, order {order}, with the neighbour.",
            "Only part of my delivery came: {items} are still missing.",
            "Can you deliver {order} a day later? Nobody is at home to take the {product}.",
            "The parcel service cannot find my {product}. Do you know where it is?",
            "Delivery question: order {order}, {digits} x {product}. When will they come?",
            "Is there any news on the delivery of the {product}? We hoped to have it by now.",
        ),
        "invoice": (
            "Please send me the invoice for order {order}, {items}.",
            "I cannot find the invoice for the {product}. Could you mail it again?",
            "Our bookkeeper needs a copy of the invoice for {items}.",
            "The invoice for order {order} shows the wrong address. It was for the {product}.",
            "The invoice for {items} has the wrong total. Could you correct it?",
            "May I have an invoice with VAT for the {product} from order {order}?",
            "The invoice for {order} lists the {product} at the old price. Please correct it.",
            "There was no invoice in the box with the {items}. Can you send it?",
            "Please put our company name on the invoice for the {product}.",
            "I have paid for {items} already, yet I got a reminder about the invoice.",
            "Invoice for {order}, please: {digits} x {product}, to be sent by e-mail.",
            "My tax office asks for the invoice for the {product}, order {order}.",
            "Could you split the invoice for order {order}? It covers {items}.",
            "The invoice for the {product} is in the wrong currency. Please issue a new copy.",
        ),
    },
    "test": {
        "order": (
            "We'd love to have {items} for the community centre.",
            "Kindly prepare {items} for me; I will pick them up myself.",
            "Is the {product} available? Then I'll take {quantity}.",
            "Time to restock: {items}, sent the normal way.",
            "Let me get {quantity} of your {product}, charged to our account.",
            "After a long debate, our club has decided to purchase {items} from you.",
            "We picked the {product} and want {digits} pieces.",
            "As {order} has not left yet, please include another {items}.",
            "I've finally decided and wish to buy the {product} on your front page.",
            "New purchase for our workshop: {digits} x {product}.",
        ),
        "cancel": (
            "Please drop {order}; the {items} are not needed any more.",
            "Sorry, I must back out of buying the {product}.",
            "You may delete {order}, because we found the {product} closer to home.",
            "There is no need to ship the {items} now, as the project has ended.",
            "I pressed the button too early. Can {order}, the {product}, be cancelled?",
            "Scrap my purchase of {items}, if it isn't too late.",
            "Our plans are different now: kindly cancel {order} with its {digits} x {product}.",
            "Can I still undo yesterday's purchase of the {product}?",
            "We had asked for {items}, but the board said no. Consider that order cancelled.",
            "Regarding {order}, don't pack the {product} after all. We can do without.",
        ),
        "return": (
            "Having unpacked {order}, I see that {items} are faulty. They are going back to you.",
            "The {product} isn't what we expected. Which address should I post it back to?",
            "I'd like to hand back {quantity} of the {product} at your counter.",
            "What are the steps for a refund? The {product} from {order} has a fault.",
            "Please fetch {items} from us again, since they are too small.",
            "Sadly the {product} looks nothing like the photo, so back it goes.",
            "We'll keep most of {order}, but {items} must travel back to your warehouse.",
            "Defective goods: {digits} x {product}. Tell me how to post them back.",
            "The gift wasn't to her taste. Will you take back the {product}, {order}?",
            "We have {items} left over from {order}, all sealed. Do you accept returns?",
        ),
        "delivery": (
            "Any idea how long {order} will take? I'm hoping to get the {product} soon.",
            "My {items} seem to be stuck somewhere on the road. What's the status?",
            "The van never showed up with the {product}. What happened?",
            "I need a tracking link for {order}, {digits} x {product}.",
            "Did the {items} leave your warehouse already?",
            "It's nine days since you shipped the {product}, and our doorstep is empty.",
            "What time does the courier bring {order}? Someone must be in to accept the {product}.",
            "Can the {product} be dropped off at the back gate instead of the front door?",
            "We paid for express shipping of {items}, {order}, but nothing has turned up.",
            "The carrier claims {order} was handed over, yet there's no {product} here.",
        ),
        "invoice": (
            "For our records, we still lack the bill for {items}.",
            "The paperwork for {order} came without an invoice. The goods were {items}.",
            "Could you re-issue the bill for the {product} in my wife's name?",
            "I believe we were billed too much for the {product} in {order}.",
            "Accounts can't process your invoice for {items} because the tax number is missing.",
            "How can I download the invoice for {order}, the {product}?",
            "Was the {product} billed separately? I can't see it on any invoice.",
            "We settled {order} in May, so why is the bill for {items} marked unpaid?",
            "Please forward a PDF invoice covering {digits} x {product}.",
            "You promised 10 percent off the {product}, but invoice {order} shows no discount.",
        ),
    },
}


def capacity(split: str) -> int:
    """The most rows a split can have: every customer writes once."""
    return len(FIRST_NAMES[split]) * len(SURNAMES[split])


def deal(rng: random.Random, cards: Sequence[str]) -> Iterator[str]:
    """Deal the cards in random order, all of them before any comes again."""
    while True:
        yield from rng.sample(cards, len(cards))


def write_mail(rng: random.Random, split: str, name: str, body: str) -> str:
    """Put a body between a greeting and a sign-off, with or without small talk and other facts."""
    while True:
        introduced = rng.random() < 0.3
        parts = [
            rng.choice(INTROS[split]) if introduced else "",
            rng.choice(LEADS[split]) if rng.random() < 0.5 else "",
            body,
            rng.choice(TAILS[split]) if rng.random() < 0.5 else "",
        ]
        greeting = rng.choice(GREETINGS[split]) if rng.random() < 0.85 else ""
        ending = rng.choice((FAREWELLS if introduced else SIGN_OFFS)[split])
        text = "\n".join(filter(None, (greeting, " ".join(filter(None, parts)), ending)))
        mail = text.format(
            name=name,
            number=rng.randint(3, 9),
            weekday=rng.choice(WEEKDAYS),
            phone=f"555-01{rng.randrange(100):02}",
            account=rng.randrange(10_000, 100_000),
        )
        if WORDS[0] <= len(mail.split()) <= WORDS[1]:
            return mail


def make_row(rng: random.Random, split: str, intent: str, facts: dict[str, str]) -> dict[str, str]:
    """One row; facts holds the customer, the product and the body with its slots open."""
    body, product = facts["body"], facts["product"]
    amount = rng.randint(2, 12) if rng.random() < 0.7 else rng.randint(13, 24)
    spelled = NUMBERS[amount] if amount < len(NUMBERS) and rng.random() < 0.5 else str(amount)
    # Even numbers for one split and odd ones for the other keep them apart under any seed.
    order = f"K-{rng.randrange(10_000, 100_000, 2) + SPLITS.index(split)}"
    filled = body.format(
        items=f"{spelled} {product}s",
        product=product,
        quantity=spelled,
        digits=amount,
        order=order,
    )
    counted = any(slot in body for slot in ("{items}", "{quantity}", "{digits}"))
    record = {
        "intent": intent,
        "customer": facts["customer"],
        "product": product,
        "quantity": amount if counted else None,
        "order_no": order if "{order}" in body else None,
    }
    return {
        "instruction": INSTRUCTION,
        "input": write_mail(rng, split, facts["customer"], filled),
        "output": json.dumps(record, ensure_ascii=False, separators=(",", ":")),
    }


def make_rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """The rows of a split ("train" or "test"), the same ones whenever count and seed are."""
    if split not in SPLITS:
        raise ValueError(f"The split must be train or test, not {split!r}.")
    if not 1 <= count <= capacity(split):
        raise ValueError(
            f"The {split} split can have 1 to {capacity(split)} distinct mails, not {count}."
        )
    rng = random.Random(f"{split} {seed}")
    customers = [f"{first} {last}" for first in FIRST_NAMES[split] for last in SURNAMES[split]]
    products = deal(rng, PRODUCTS[split])
    bodies = {intent: deal(rng, BODIES[split][intent]) for intent in INTENTS}
    rows = []
    for number, customer in enumerate(rng.sample(customers, count)):
        intent = INTENTS[number % len(INTENTS)]
        facts = {"customer": customer, "product": next(products), "body": next(bodies[intent])}
        rows.append(make_row(rng, split, intent, facts))
    rng.shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write the rows in one step, so that no reader ever finds half a file."""
    draft = path.with_name(path.name + ".tmp")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    draft.write_text(text, encoding="utf-8", newline="\n")
    os.replace(draft, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Write train.jsonl and test.jsonl: shop e-mails and the record of each.",
        epilog="example: python examples/orders/generate.py data/orders --train 480 --test 300",
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder for the two files")
    for split, rows in (("train", 480), ("test", 300)):
        text = f"rows in {split}.jsonl, at most {capacity(split)} (default: %(default)s)"
        parser.add_argument(f"--{split}", type=int, default=rows, metavar="ROWS", help=text)
    parser.add_argument("--seed", type=int, default=0, help="which draw (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        files = {
            options.out_dir / f"{split}.jsonl": make_rows(
                split, getattr(options, split), options.seed
            )
            for split in SPLITS
        }
        options.out_dir.mkdir(parents=True, exist_ok=True)
        for path, made in files.items():
            write_jsonl(path, made)
            print(f"{len(made)} rows: {path}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Cannot write to {options.out_dir}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
