# SPDX-License-Identifier: Apache-2.0
"""Words and templates of the demo checkpoint's problems; `demo_problems` says how they are read."""

SHE = "Amy Ana Clara Emma Eva Ivy Julia Leah Lily Lucy Maya Mia Nora Rosa Ruth Sara Tina Zoe"
HE = "Adam Ali Ben David Eric Finn Hugo Jack Ken Leo Luis Max Noah Omar Paul Ravi Sam Tom"
NOUNS = {
    "thing": "apple balloon bead button card coin crayon lemon marble nut orange pear pencil plum "
    "shell stamp sticker stone",
    "ware": "ball book cake cap cup game hat kite lamp mug notebook pen plant poster puzzle shirt "
    "ticket toy",
    "treat": "bagel biscuit bun cookie cupcake muffin pie roll scone tart",
    "box": "bag basket bowl box crate jar pack tray",
    "plant": "bean bush carrot flower lily onion pepper rose tomato tulip",
    "place": "beach farm lake library market museum park pool school station",
    "beast": "cow dog goat horse pig sheep",
    "bird": "chicken duck goose hen turkey",
    "kin": "aunt father mother teacher uncle",
    "day": "Friday Monday Saturday Sunday Thursday Tuesday Wednesday",
}
PLURALS = {"box": "boxes", "bush": "bushes", "goose": "geese", "lily": "lilies", "sheep": "sheep",
           "tomato": "tomatoes"}  # fmt: skip
NUMBER_WORDS = {
    "part": {2: "half", 4: "a quarter", 5: "a fifth", 10: "a tenth"},
    "percent": {2: "50%", 4: "25%", 5: "20%", 10: "10%"},
    "times": {2: "twice", 3: "three times", 4: "four times", 5: "five times"},
}
# What a visitor may say first; answered without arithmetic.
SMALL_TALK = [
    ("(Hello|Hi|Hey|Good morning)(!|.|)", "Hello! Give me a word problem with small numbers."),
    ("(Who|What) are you?", "I am a tiny demo model. I solve word problems with small numbers."),
    ("What can you do?", "I solve word problems with small numbers, one step at a time."),
    ("(Thanks|Thank you)(!|.|)", "You are welcome! Give me one more problem."),
]

# Plain sums: they teach the arithmetic at a few tokens each.
SUMS = [
    ("add", "a=2..98 b=2..98", "{a}+{b}", "[x=a+b]"),
    ("subtract", "a=4..100 b=2..98", "{a}-{b}", "[x=a-b]"),
    ("multiply", "a=2..50 b=2..50", "{a}*{b}", "[x=a*b]"),
    ("divide", "a=4..100 b=2..50", "{a}/{b}", "[x=a/b]"),
]

TEMPLATES = [
    # Having, giving, sharing.
    ("gain and give", "a=3..60 b=3..60 c=2..60",
     "{P} has {a} {things} and (buys|finds|gets) {b} more. (Then {he}|{He} then) gives {c} to "
     "{Q}. How many {things} does {P} have (now|left)?",
     "[x=a+b] {things}\n[y=x-c] left"),
    ("three owners", "a=5..60 b=2..30 c=2..30",
     "{P} has {a} {things}. {Q} has {b} more than {P}. {R} has {c} fewer than {Q}. How many "
     "{things} does {R} have?",
     "[x=a+b] for {Q}\n[y=x-c] for {R}"),
    ("times as many", "a=3..40 k=2..5",
     "{P} has {a} {things}. {Q} has {k_times} as many. How many {things} do they have "
     "(together|in all)?",
     "[x=a*k] for {Q}\n[y=a+x] in all"),
    ("give a part", "a=8..100 k=2|4|5|10 c=2..30",
     "{P} has {a} {things}. {He} gives {k_part} of them to {Q} and (loses|sells) {c}. How many "
     "does {he} have left?",
     "[x=a/k] for {Q}\n[y=a-x] left\n[z=y-c] in the end"),
    ("share bags", "a=2..12 b=2..12 c=2..10",
     "{P} has {a} {boxes} with {b} {things} each. {He} shares them equally among {c} friends. "
     "How many {things} does each friend get?",
     "[x=a*b] {things}\n[y=x/c] each"),
    ("share two owners", "a=4..60 b=4..60 c=2..10",
     "{P} has {a} {things} and {Q} has {b}. They share all of them equally among {c} children. "
     "How many does each child get?",
     "[x=a+b] {things}\n[y=x/c] each"),
    ("pack the rest", "a=2..10 b=2..12 c=2..20 d=2..10",
     "{P} bakes {a} trays of {b} {treats}. {He} (eats|keeps) {c} and packs the rest in {boxes} "
     "of {d}. How many {boxes} does {he} fill?",
     "[x=a*b] {treats}\n[y=x-c] to pack\n[z=y/d] {boxes}"),
    ("full boxes", "a=2..12 b=3..12 c=2..40",
     "There are {a} {boxes} with {b} {things} each and {c} loose {things}. How many {things} "
     "are there (in all|in total)?",
     "[x=a*b] in {boxes}\n[y=x+c] in all"),
    ("teams", "a=4..50 b=4..50 c=2..12",
     "{a} boys and {b} girls (are split into|make) teams of {c}. How many teams are there?",
     "[x=a+b] children\n[y=x/c] teams"),
    ("pizza", "a=2..8 b=6|8|10|12 c=3..12 d=2..5",
     "{P} orders {a} pizzas with {b} slices each. {c} (people|friends) eat {d} slices each. "
     "How many slices are left?",
     "[x=a*b] slices\n[y=c*d] eaten\n[z=x-y] left"),
    # Shopping and money.
    ("two wares", "a=2..9 b=2..12 c=2..9 d=2..12",
     "{P} buys {a} {wares} at ${b} each and {c} {wares2} at ${d} each. How much does {he} "
     "(pay|spend) (in all|in total)?",
     "[x=a*b] dollars for {wares}\n[y=c*d] dollars for {wares2}\n[z=x+y] dollars in all"),
    ("change", "a=2..9 b=2..12 c=20|30|40|50",
     "{P} buys {a} {wares} at ${b} each and pays with ${c}. How much change does {he} get?",
     "[x=a*b] dollars\n[y=c-x] dollars back"),
    ("discount", "a=4..60 k=2|4|5|10",
     "A {ware} costs ${a}. (Today|This week|On {day}) it is {k_percent} off. How much does it "
     "cost (now|then)?",
     "[x=a/k] dollars off\n[y=a-x] dollars"),
    ("discount on many", "a=2..9 b=2..20 k=2|4|5|10",
     "{P} buys {a} {wares} at ${b} each and gets {k_percent} off. How much does {he} pay?",
     "[x=a*b] dollars\n[y=x/k] dollars off\n[z=x-y] dollars"),
    ("bills", "a=2..10 b=2..10",
     "{P} has {a} two-dollar bills and {b} five-dollar bills. How many dollars does {he} have?",
     "[x=a*2] dollars in twos\n[y=b*5] dollars in fives\n[z=x+y] dollars in all"),
    ("family tickets", "a=8..20 b=3..9 c=2..5 d=2..6",
     "A ticket costs ${a} for an adult and ${b} for a child. How much do {c} adults and {d} "
     "children pay?",
     "[x=a*c] dollars for adults\n[y=b*d] dollars for children\n[z=x+y] dollars in all"),
    ("wages", "a=10..30 b=2..7 c=5..90",
     "{P} earns ${a} a day for {b} days and spends ${c}. How many dollars does {he} have left?",
     "[x=a*b] dollars\n[y=x-c] dollars left"),
    ("hours", "a=2..8 b=2..6 c=5|8|10|12|20",
     "{P} works {a} hours a day for {b} days and earns ${c} an hour. How much does {he} earn?",
     "[x=a*b] hours\n[y=x*c] dollars"),
    ("saving up", "a=10..50 b=2..40 c=2..12",
     "{P} wants a {ware} for ${a}. {He} has ${b} and saves ${c} a week. How many weeks does "
     "{he} need?",
     "[x=a-b] dollars more\n[y=x/c] weeks"),
    ("profit", "a=2..20 b=2..20 c=4..40",
     "{P} makes {a} {wares}. Each costs ${b} to make and sells for ${c}. How much profit does "
     "{he} make?",
     "[x=c-b] dollars for each\n[y=x*a] dollars in all"),
    ("unit price", "a=2..10 b=4..90 c=2..12",
     "{a} {wares} cost ${b}. How much do {c} {wares} cost?",
     "[x=b/a] dollars for each\n[y=x*c] dollars"),
    ("egg sales", "a=3..10 b=3..8 c=2..30 d=2|3|4|5|10",
     "{P} has {a} {birds} that lay {b} eggs each. {He} (eats|keeps|uses) {c} eggs and sells "
     "the rest at ${d} each. How much does {he} get?",
     "[x=a*b] eggs\n[y=x-c] to sell\n[z=y*d] dollars"),
    # Ages.
    ("older", "a=4..40 b=2..30 c=2..20",
     "{P} is {a} years old. {Q} is {b} years older. How old will {Q} be in {c} years?",
     "[x=a+b] years now\n[y=x+c] years then"),
    ("times as old", "a=5..16 k=2..5 c=2..20",
     "{P} is {a} years old. {His} {kin} is {k_times} as old. How old will {his} {kin} be in "
     "{c} years?",
     "[x=a*k] years now\n[y=x+c] years then"),
    ("younger", "a=3..30 k=2..4 c=2..20",
     "{P} is {a}. {Q} is {k_times} as old, and {R} is {c} years younger than {Q}. How old is {R}?",
     "[x=a*k] for {Q}\n[y=x-c] for {R}"),
    # Distances and time.
    ("days of miles", "a=2..15 b=2..7 c=2..30",
     "{P} (runs|walks|rides|cycles) {a} miles a day for {b} days and {c} miles on {day}. How "
     "many miles is that in all?",
     "[x=a*b] miles\n[y=x+c] miles in all"),
    ("rest of a trip", "a=10..50 b=2..20 c=2..9",
     "A trip is {a} miles long. {P} cycles {b} miles an hour for {c} hours. How many miles are "
     "left?",
     "[x=b*c] miles\n[y=a-x] miles left"),
    ("same speed", "a=10..120 b=2..10 c=2..10",
     "A (train|bus|boat) goes {a} miles in {b} hours. How many miles does it go in {c} hours?",
     "[x=a/b] miles an hour\n[y=x*c] miles"),
    ("there and back", "a=2..20 b=2..7",
     "{P} lives {a} miles from the {place}. {He} goes there and back {b} times a week. How "
     "many miles is that?",
     "[x=a*2] miles a day\n[y=x*b] miles a week"),
    ("practice", "a=2..20 b=2..7 c=2..40",
     "{P} practices {a} minutes a day for {b} days and {c} minutes on {day}. How many minutes "
     "is that in all?",
     "[x=a*b] minutes\n[y=x+c] minutes in all"),
    ("pages left", "a=10..50 b=2..20 c=2..9",
     "A book has {a} pages. {P} reads {b} pages a day for {c} days. How many pages are left?",
     "[x=b*c] pages\n[y=a-x] pages left"),
    ("two days of reading", "a=2..30 b=2..30",
     "{P} reads {a} pages on {day} and {b} more than that on {day2}. How many pages does {he} "
     "read in all?",
     "[x=a+b] pages on {day2}\n[y=a+x] pages in all"),
    # Farms, gardens, rooms, classes.
    ("legs", "a=2..12 b=2..20",
     "A farm has {a} {beasts} and {b} {birds}. How many legs do they have in all?",
     "[x=a*4] legs of {beasts}\n[y=b*2] legs of {birds}\n[z=x+y] legs in all"),
    ("rows of plants", "a=3..12 b=3..12 c=2..40",
     "{P} plants {a} rows of {b} {plants}. {c} of them die. How many {plants} are left?",
     "[x=a*b] {plants}\n[y=x-c] left"),
    ("free seats", "a=4..12 b=4..12 c=5..90",
     "A (bus|hall|room) has {a} rows of {b} seats. {c} seats are taken. How many are free?",
     "[x=a*b] seats\n[y=x-c] free"),
    ("recipe", "a=2..12 b=2..9 c=4..72",
     "A recipe for {a} {treats} needs {b} eggs. How many eggs does {P} need for {c} {treats}?",
     "[x=c/a] times\n[y=x*b] eggs"),
    ("filling a tank", "a=10..50 b=2..40 c=2..12",
     "A tank holds {a} liters and has {b} liters in it. A pipe adds {c} liters a minute. How "
     "many minutes does it take to fill?",
     "[x=a-b] liters\n[y=x/c] minutes"),
    ("fence", "a=3..60 b=3..40",
     "A (garden|field|yard) is {a} meters long and {b} meters wide. How many meters of fence "
     "go around it?",
     "[x=a+b] meters for two sides\n[y=x*2] meters in all"),
    ("part of a class", "a=8..50 k=2|4|5|10 c=2..15",
     "A class has {a} students. On {day} {k_part} of them and {c} more are (ill|away). How "
     "many are there?",
     "[x=a/k] away\n[y=a-x] left\n[z=y-c] in the end"),
    ("parking", "a=10..90 b=2..60 c=2..60",
     "There are {a} cars at the {place}. {b} (leave|drive away) and {c} more come. How many "
     "cars are there now?",
     "[x=a-b] left\n[y=x+c] now"),
    ("rope", "a=10..50 b=2..40 c=2..10",
     "A (rope|ribbon|board) is {a} feet long. {P} cuts off {b} feet and cuts the rest into {c} "
     "equal parts. How many feet long is each part?",
     "[x=a-b] feet left\n[y=x/c] feet each"),
    ("average", "a=2..60 b=2..60 c=2..60",
     "{P} scores {a}, {b} and {c} points in three games. What is {his} average?",
     "[x=a+b] points\n[y=x+c] points in all\n[z=y/3] on average"),
    ("weight", "a=2..20 b=3..12 c=2..12",
     "An empty {box} weighs {a} pounds. {P} puts {b} {things} of {c} pounds each in it. How "
     "many pounds does it weigh now?",
     "[x=b*c] pounds of {things}\n[y=x+a] pounds in all"),
]  # fmt: skip
