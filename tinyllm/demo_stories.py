"""The built-in text: small synthetic stories, made by a grammar, so that all four steps run offline.

    python -m tinyllm.demo_stories    # print three of them

A plot is drawn, then its people, things and phrases: good for seeing a model learn, while one that
can write about anything needs real text. The same seed gives the same stories on every platform.

The grammar: `== name` begins a plot; its slots come first, its paragraphs follow. A slot's values
stand between ` | `, `a / b = x / y | ...` fills two slots together. In a text, `[a|b]` picks one,
`{slot}` is filled, `{Slot}` with a capital. `{he} {him} {his}` follow the hero, `{fhe}` the friend, `{hhe}` the helper.
"""
import random
import re
from collections.abc import Iterator
from typing import Any

BOYS = "Tom Ben Max Sam Leo Jack Finn Oscar Noah Theo Hugo Eli Peter Felix".split()
GIRLS = "Lily Mia Anna Sue Zoe Emma Ruby Nora Ella Ivy Rosa Clara Amy Lucy".split()
ANIMALS = {  # the name tells whether it is a he or a she
    "fox": ("Rusty", "Vera"), "bear": ("Bruno", "Honey"), "rabbit": ("Clover", "Poppy"), "mouse": ("Pip", "Tilly"),
    "duck": ("Quincy", "Daisy"), "cat": ("Milo", "Luna"), "dog": ("Biscuit", "Bella"), "frog": ("Hopper", "Lotta"),
    "squirrel": ("Hazel", "Nutty"), "hedgehog": ("Spike", "Bramble"), "turtle": ("Sheldon", "Tessa"),
    "lamb": ("Woolly", "Fleur"), "owl": ("Oliver", "Olga"), "pony": ("Comet", "Dolly"),
}

GRAMMAR = r'''
== common
trait = kind | curious | cheerful | shy | brave | quiet | lively | gentle | clever | silly | happy | little | young
    | merry | busy | dreamy | friendly | playful | careful | funny
color = red | blue | green | yellow | purple | orange | pink | white | golden | silver | brown | black
home = in a [small|little|tall|white|cozy] house [near the forest|by the river|on a hill|by the sea]
    | at the edge of a [quiet|pretty|sleepy] village | on a [big|busy|small] farm | in a [warm|noisy|lovely] town
    | near a [deep|dark|green|wide] forest
hobby = paint pictures | sing songs | climb trees | look at the stars | jump in puddles | collect shiny stones
    | ride a bike | read books | bake cakes | listen to stories | watch the birds | play hide and seek
    | build towers | dance in the kitchen | pick flowers | fly kites | draw animals | swim in the lake
    | count the clouds | play the drum
time = One [day|morning|afternoon|evening] | One [sunny|windy|warm|cold|bright|cloudy] [day|morning|afternoon]
    | On a [sunny|quiet|fine|chilly] [day|morning] | One day after [lunch|breakfast|school]
intro = Once upon a time, there was a {trait} {kind} named {name}.
    | Once upon a time, there was a {trait} {kind} named {name}. {He} loved to {hobby}.
    | There once was a {trait} {kind} called {name}. | {name} was a {trait} {kind} who lived {home}.
    | {name} was a {trait} {kind}. {He} liked to {hobby}. | Once, {home}, there lived a {trait} {kind} named {name}.
    | A {trait} {kind} named {name} lived {home}. {He} loved to {hobby}.
helper / hhe = mom / she | dad / he | grandma / she | grandpa / he | aunt / she | uncle / he | big sister / she
    | big brother / he
glad = {name} [smiled|laughed|clapped|cheered]. | {name} felt [happy|proud|warm inside|glad|much better].
    | {name} gave a big [smile|laugh].
end = [||{close}]
close = The end. | And that night {name} slept [very well|with a smile].
    | It was the best day of the [week|year|summer]. | They talked about it for many days.

== lost
toy = ball | kite | drum | boat | train | doll | robot | truck | whistle | hat | scarf | bell | lantern | puppet
    | top | bucket
place / spot = in the garden / under a cabbage leaf | in the garden / behind the watering can
    | in the garden / between the tall sunflowers | in the park / under the wooden bench
    | in the park / behind the big oak tree | in the park / beside the swings | at the beach / behind a sand castle
    | at the beach / between two flat rocks | at school / behind the bookshelf
    | at school / under the teacher's desk | at the market / next to a basket of apples
    | at the market / under a table full of bread | in the barn / on top of the hay
    | in the barn / behind an old wheel | by the pond / among the tall grass | by the pond / under the little bridge

{intro} {He} had a {color} {toy}. {He} [took it everywhere|loved it more than anything|played with it every
day|slept beside it every night|got it for {his} birthday]. {time}, {name} played {place}. [When {he} came home, the
{toy} was gone.|When it was time to go home, {he} forgot the {toy}.|At bedtime, {he} could not find the {toy}.]

"[Oh no!|Oh dear!] Where is my {toy}?" {name} [cried|asked]. {He} looked under the [bed|chair|table|sofa] and behind
the [door|curtain|clock], but it was not there. [||{name} felt very [sad|worried|upset].] {His} {helper} [gave {him}
a hug|sat down beside {him}|took {his} hand]. "[Do not cry|Close your eyes and think]," {hhe} said. "Where did you
last [see|have] it?"

"I played {place}," said {name}. So they [walked|hurried|ran] back together. {name} looked [everywhere|here and
there]. At last, {spot}, {he} found the {color} {toy}!

[{name} hugged the {toy}.|{name} jumped for joy.|{glad}] "Thank you for helping me," {he} said. From then on, {name}
[always put the {toy} back in its place|never forgot the {toy} again|always looked around before {he} went home].
{end}

== share
food = cookies | strawberries | grapes | cherries | nuts | pancakes | muffins | plums | sandwiches | pears | carrots
    | apples | berries
from = from {his} grandma | at the bakery | in the garden | for lunch | from a neighbor | from the market
event = had dropped {fhis} lunch in the mud | had forgotten {fhis} lunch | had nothing to eat
    | had given {fhis} lunch to a hungry bird

{intro} {time}, {name} got a [basket|bag|box|bowl] of {food} {from}. "[These are all mine|I will eat them all by
myself]," {he} thought. [|||{He} sat down under a tree.|{He} went to the park.]

Then {friend} came by. {friend} {event}, and {fhis} tummy was empty. "May I have [some|a few|one], please?" asked
{friend}. {name} shook {his} head. "No, they are mine," {he} said. {friend} [looked down and walked away|said
nothing and went to sit alone|had tears in {fhis} eyes].

{name} ate [two|three|a few], but [they did not taste so good|{he} did not feel happy]. Then {he} saw {friend}, who
[was all alone|sat on a stone|watched the water]. {He} [ran|walked] over. "I am sorry, {friend}. Let us [share|eat
them together]," {he} said.

{friend} [smiled|was so glad]. "Thank you!" {fhe} said. They [ate|shared] the {food} and [laughed|talked|told jokes]
until [the sun went down|it was time to go home|the stars came out]. {name} learned that [{food} taste better with a
friend|sharing makes everyone happy|a full heart is better than a full bag]. {end}

== afraid
fear / try / trick / calm =
    the dark / sleep without a light / Look out of the window and count the stars / the dark was soft and quiet
    | deep water / swim in the lake / Hold my hand and kick with your legs / the water was cool and fun
    | thunder / stay in {his} own bed during a storm / Count slowly until the thunder comes / it was only a loud song
    | the tall slide / go down the slide / Take one step at a time and look up / it felt just like flying
    | big dogs / pet the neighbor's dog / Hold out your hand and let it sniff / the dog had soft ears
    | the old bridge / walk over the bridge / Look at the other side, not at the water / the bridge was strong
    | loud noises / go to the big parade / Put your hands on your ears and smile / the music made {his} feet dance
    | the doctor / visit the doctor / Take a deep breath and squeeze my hand / it was over very fast
    | singing alone / sing for the whole class / Sing as if you sing only to me / the song came out clear and sweet

{intro} But {name} was afraid of {fear}. [|||{He} did not tell anyone.|{He} felt {his} knees shake when {he} thought
of it.] {time}, {he} had to {try}.

"I can not do it," {name} [whispered|said]. "I am too [scared|afraid|small]." "I was afraid of {fear} too when I was
[little|young|your age]," said {his} {helper}. "I know a trick. {trick}."

{name} took a [deep|slow] breath. [||{His} heart [beat fast|went boom, boom, boom].] {He} [tried it once, and then
again|did what {his} {helper} said|closed {his} eyes and tried]. [After a while|Little by little|Soon], {he} was not
so scared. {He} found that {calm}.

"I did it!" {name} [shouted|called|cried]. {His} {helper} [hugged {him}|was very proud|clapped]. "Being brave means
you try even when you are afraid," {hhe} said. After that day, {name} was [not afraid of {fear} anymore|a little
braver every day]. {end}

== rescue
animal / trouble / fix / gift =
    bird / had hurt its wing / wrapped the wing in a soft cloth / sang a song at {his} window
    | kitten / was stuck in a tall tree / climbed up with a ladder / curled up in {his} lap and purred
    | turtle / lay on its back / turned it over with great care / showed {him} the way to a secret pond
    | bee / had fallen into the water / held out a leaf like a boat / led {him} to the sweetest flowers
    | puppy / was lost in the rain / dried it with a warm towel / licked {his} nose and wagged its tail
    | butterfly / was caught in a spider web / set it free with a thin stick / danced around {his} head
    | fish / was trapped in a small pool / carried it to the river in a bucket / jumped high and splashed
    | snail / was in the middle of the road / put it safely on the grass / left a silver line on {his} path
    | baby deer / could not find its mother / walked with it to the trees / came back with its mother to say hello

{intro} {time}, {name} was on {his} way to the [river|market|forest|meadow|field] when {he} heard a
[small|strange|tiny|sad] sound. {He} stopped and looked around. It was a little {animal}. The {animal} {trouble}.

"[Poor thing|Do not be afraid|I will help you]," said {name}. [|||{He} was [late|in a hurry|tired], but {he} could
not leave the {animal} alone.] {He} [thought hard|moved very slowly]. Then {he} {fix}.

[||The {animal} [looked at {him} for a long time|felt better|was safe again].] "[Be careful next time|Goodbye,
little friend|Now you are free]," said {name}. {He} [waved|smiled] and went on {his} way.

The next [day|morning|week], the {animal} came back. It {gift}. {name} told {his} {helper} about it. "When you are
kind, [kindness comes back to you|you make a friend]," {hhe} said. {end}

== rule
rule / act / result = eat the cake before dinner / took a big bite, and then another / had a bad tummy ache
    | go near the pond alone / went to catch a frog / slipped and fell into the cold mud
    | touch the hot stove / wanted to see the soup / burned one finger
    | climb the old ladder / climbed up to the very top / was stuck and could not come down
    | run in the house / ran as fast as the wind / bumped into the table and broke a lamp
    | open the big box / lifted the lid just a little / let all the feathers fly around the room
    | play with the paint inside / painted a sun on the wall / made a terrible mess on the floor
    | leave the gate open / forgot to close it / saw the sheep run into the street
    | stay up late / played under the blanket all night / fell asleep at the party the next day

{intro} {His} {helper} had one rule. "Please do not {rule}," {hhe} [always said|said every day]. {time}, {his}
{helper} was [busy|outside|in the other room]. "[Nobody will see|Just this once]," {name} thought.

So {name} {act}. At first it was [fun|exciting|great]. But then {he} {result}. "Help!" {name}
[cried|called|shouted]. "[Please come|Come quick]!"

{His} {helper} came [at once|right away|running]. {Hhe} [helped {him}|made everything safe] and [held {him}
close|wiped {his} tears]. [||{name} looked at {his} feet.] "I am sorry," {name} said. "I [did not listen|will not do
it again]."

"I am not angry," said {his} {helper}. "The rule is there [to keep you safe|because I love you]." [|||Then they
cleaned up together.|Then they drank a cup of warm milk.] {name} learned that [it is good to listen|rules can keep
us safe|a small no can be a big help]. {end}

== build
thing / part / broke / idea / use =
    kite / paper and string / fell to the ground / a longer tail / flew high above the trees
    | boat / wood and nails / sank to the bottom / a lighter deck / floated all the way across the pond
    | tree house / boards and rope / leaned to one side / a stronger beam / stood firm in the wind
    | tower / blocks and boxes / fell over with a crash / a wider bottom / was taller than the door
    | scarecrow / straw and rags / lost its head / a smaller head / smiled at everyone who walked by
    | bridge / sticks and mud / broke in the middle / a thick log / carried them over the stream
    | wagon / planks and wheels / rolled backward / a handle in front / carried all their toys
    | birdhouse / bark and glue / fell off the branch / a good strong nail / was soon full of tiny birds
    | tent / blankets and poles / dropped on {his} head / two more poles / kept them dry all night

{intro} {time}, {name} wanted to build a {thing}. {He} found {part} in the [shed|attic|garage|barn|yard]. {He}
worked [all morning|very hard|until noon]. But when it was done, the {thing} {broke}.

{name} [kicked a stone|sat down and sighed|was very angry]. "I give up!" {he} said. "I will never build a {thing}."
[|||{friend} sat down next to {him}.|{friend} scratched {fhis} head.] "[Do not give up|We can fix it|It is almost
right]," said {his} friend {friend}. "Maybe it only needs {idea}."

So they tried again. {friend} held the {part}, and {name} [worked slowly|made each part fit]. [|||It was [hard|not
easy], but they [did not stop|sang while they worked].]

This time, the {thing} {use}. "[Look at that|It works|Hurray]!" {name} [shouted|cried|called]. {name} learned that
[trying again is the way to learn|two friends can do more than one|every mistake can teach you something]. {end}

== rain
plan / wet = have a picnic / The grass was wet | go to the beach / The sand was wet
    | ride bikes / The road was full of puddles | visit the zoo / The zoo was closed
    | pick apples / The trees dripped with water | fly a kite / The wind was too strong
    | play ball / The field was all mud
inside / prop = a castle / pillows and blankets | a ship / chairs and a broom | a circus / hats and scarves
    | a shop / cans and paper money | a train / boxes and plates | a puppet show / old socks and buttons
    | a picnic on the floor / bread and jam | a jungle / plants and green paper

{intro} {name} and {friend} wanted to {plan}. [|||They had talked about it all week.] But that morning,
[dark|gray|heavy] clouds came, and it began to [rain|pour]. {wet}.

"[This is the worst day|It is not fair|Our day is ruined]," said {name}. {He} [pressed {his} nose to the window|sat
on the stairs|made a sad face]. [||The rain went [drip, drop, drip|tap, tap, tap] on the roof.] Then {friend}
[smiled|jumped up]. "I have an idea," {fhe} said. "Let us make {inside}!"

They found {prop}. {name} was [the captain|in charge|the owner], and {friend} was [the guard|the cook|the helper].
[|||{His} {helper} [came to play too|brought hot cocoa|made popcorn].] They [laughed so hard that they fell
over|played until dark|forgot all about the rain].

In the evening, [a rainbow stood over the hills|the moon came out|the rain stopped]. "Now we can {plan} tomorrow,"
said {friend}. {name} [smiled|laughed]. "Yes, but [I hope it rains again soon|today was just as good]," {he} said.
{end}

== quarrel
toy / loss = swing / The rope of the swing broke | drum / The drum had a big hole | sled / The sled broke in two
    | ball / All the air came out of the ball | wagon / A wheel came off and rolled away
    | scooter / The scooter lost a wheel | kite / The kite tore down the middle | flag / The flag tore in two
    | toy horse / The head of the toy horse came off

{intro} {His} best friend was {friend}. {time}, they found a {color} {toy} in the [attic|yard|shed|garden]. "I saw
it first!" said {name}. "No, I did!" said {friend}. {name} pulled on one side, and {friend} pulled on the other.

They pulled [harder and harder|with all their might]. [Crack|Snap|Bump]! {loss}. [|||Now nobody could play.]
{friend} [began to cry|ran home|turned away]. {name} was [angry at first|very quiet]. Then {he} felt
[sorry|lonely|bad].

{name} went to {his} {helper} and told {hhim} everything. "What matters more, the {toy} or your friend?" {hhe}
asked. [||{name} [knew the answer|did not have to think long].] {name} [ran|walked] to {friend} and said, "I am
sorry." "I am sorry too," said {friend}.

They fixed the {toy} with [glue|tape|a piece of string], and {his} {helper} helped. After that, they [took
turns|shared it|played with it together]. "You first," said {name}. "No, you first," said {friend}, and they both
[laughed|giggled]. {end}

== new
where = at school | in the street | on the playground | in the village | at the library
talent = whistle like a bird | draw funny faces | juggle three oranges | tell long stories about the sea
    | run faster than anyone | make animals out of paper | stand on one leg | play the flute
    | do magic tricks with coins
game = hide and seek | tag | ball | jump rope | pirates | marbles | cards

{intro} {time}, there was a new face {where}. It was {friend}. {Fhe} [stood by the wall|sat alone on a bench|held a
book and looked at the ground]. [|||The others [played {game}|laughed and ran], and nobody [asked {fhim} to
play|said hello].]

{name} saw {fhim}. [|||{He} remembered how it feels to be alone.|{He} was a little shy.] {He} [took a deep
breath|counted to three] and walked over. "Hello, I am {name}," {he} said. "Do you want to play {game} with us?"

{friend} smiled. "[Yes, please|I would love to]," {fhe} said. They played {game} [all afternoon|until the bell
rang|until dinner]. Then {friend} showed them something. {Fhe} could {talent}! Everyone [cheered|clapped|wanted to
learn it].

"I was [so scared|very sad] this morning," {friend} told {name}. "[Now I have a friend|You made my day]." From that
day on, {name} and {friend} [were always together|met every day|were best friends].[||| A [kind|small] word can
[change a whole day|open a door].] {end}

== truth
vase = vase | cup | plate | teapot | bowl | jar | pot | mug
how = threw a ball inside | danced too close to the table | chased the cat around the room
    | swung a stick like a sword | reached for the cookies
hide = under the rug | behind the sofa | in the bottom of a drawer | under some leaves | in an old sack

{intro} {time}, {name} {how}. Crash! The {color} {vase} fell and broke into [many|a hundred|small] pieces. [|||It
was the {vase} that {his} {helper} loved.] {name} was [frightened|very scared]. {He} hid the pieces {hide}.

At dinner, {his} {helper} asked, "Has anyone seen the {color} {vase}?" {name} [looked at {his} plate|felt {his} face
get hot|could not eat]. "No," {he} said [softly|in a small voice]. That night {he} could not sleep. [|||The lie sat
in {his} [chest|tummy] like a [cold|heavy] stone.]

In the morning, {name} [went to {his} {helper}|ran to the kitchen]. "I broke the {vase}," {he} said. "I hid it, and
I told a lie. I am [very|so] sorry." [|||Tears ran down {his} face.|{His} voice shook.]

"Thank you for telling the truth," said {his} {helper}. "A {vase} can be [fixed|replaced], but trust is [worth
more|harder to fix]." They [glued the pieces|picked up the pieces|made a new one from clay] together. {name} felt as
light as a feather. {end}

== garden
plant / grown / harvest = sunflower seed / a sunflower as tall as the roof / gave the seeds to the birds
    | pumpkin seed / a pumpkin as big as a chair / made soup for the whole street
    | bean / a bean plant that climbed the wall / cooked the beans for dinner
    | apple seed / a small tree with one red apple / cut the apple into six pieces
    | tulip bulb / a bright red tulip / put it in a glass by the window
    | carrot seed / a row of sweet carrots / shared the carrots with the rabbits
    | tomato seed / a bush full of round tomatoes / made a fresh salad
    | melon seed / a melon with green stripes / ate it on the porch

{intro} {time}, {his} {helper} gave {him} a {plant}. "Put it in the ground and take good care of it," {hhe} said.
{name} [dug a little hole|found a sunny spot] and planted it. [||{He} gave it water and waited.]

The next day, nothing was there. [||The day after that, nothing was there.] "[It does not work|Maybe it is
broken|Why is it so slow]," {name} said. [|||{He} wanted to dig it up.] "[Good things take time|You have to wait|A
seed works where you can not see it]," said {his} {helper}.

So {name} waited. {He} gave it water [every morning|each day before school]. [|||{He} pulled the weeds and [talked
to it|sang to it|kept the bugs away].] Then, one [spring|bright|rainy] morning, {he} saw a tiny green leaf! It grew
and grew. After many weeks it was {grown}.

"[Look what I made|It was worth the wait]!" {name} [said|called] with shining eyes. {name} and {his} {helper}
{harvest}. {name} learned that [if you wait and care, things grow|it is good to be patient]. {end}

== gift
gift / need / way / effort = a cake / sugar / swept the floor of the shop / It was flat on one side
    | a necklace / glass beads / washed the windows of the shop / It was a little too long
    | a picture / blue paint / helped an old man carry wood / The sky went over the edge
    | a scarf / soft wool / fed the sheep for a week / It had three holes
    | a song / music paper / cleaned the music room / It had only four notes
    | a card / shiny paper / watered the flowers next door / One corner was bent
    | a basket / long reeds / walked all the way to the lake / It was not quite round

{intro} It was almost the birthday of {his} {helper}. {name} wanted to give {hhim} something special. {He} looked in
{his} [pocket|piggy bank], but there was only [one coin|a button]. "I will make {gift}," {he} [decided|said]. But
{he} had no {need}.

{name} went to {his} friend {friend}. "We can work for it," said {friend}. So they {way}. [||It was [hard|long]
work.] In the end {name} got the {need}. [|||{He} thanked {friend} and [ran|hurried] home.]

{name} worked in secret [behind a closed door|late into the night|in the shed]. At last the gift was ready.
{effort}. "[It is not good enough|Nobody will like it]," {name} thought.

On the birthday, {name} held out {gift} with [shaking|warm] hands. [||{His} {helper} looked at it for a long time.]
Then {his} {helper} [hugged {him} tight|had happy tears in {hhis} eyes]. "It is the best gift in the world," {hhe}
said, "because [it is made with love|it comes from you]." {end}

== race
prize = a golden cup | a big bag of nuts | a shiny medal | a crown of flowers | a ribbon | a honey cake
goal = the old mill | the top of the hill | the tall pine tree | the stone bridge | the red barn
stop = took a nap under a bush | stopped to look in a mirror | stopped to eat berries
    | stopped to show off for the crowd | took a wrong turn because {fhe} did not look

{intro} {time}, there was a race to {goal}. The prize was {prize}. {friend} was very fast. "I will win. You are too
slow," {fhe} said to {name}. [||Some of the others laughed.] {name} [said nothing|only smiled|looked at the ground].

"Ready, set, go!" {friend} ran off like [the wind|an arrow]. {name} went [step by step|slowly but surely]. [||{His}
legs were [short|tired], but {he} did not stop.] "[One more step|Keep going]," {he} told {himself}.

{friend} was so far ahead that {fhe} {stop}. [||"I have plenty of time," {fhe} said.] {name} [came closer and
closer|passed by without a word]. When {friend} [saw {him}|looked up], it was too late. {name} was the first to
reach {goal}!

Everyone cheered. {name} got {prize}. "I should not have laughed at you," said {friend}. "[Never mind|It is all
right]," said {name}. "Come, let us [share the prize|celebrate together]." {friend} learned that [being proud does
not win a race|you should never laugh at others]. {end}

== lostway
chase = a yellow butterfly | a little rabbit | a floating feather | a shiny blue bug | a silver bird
sign / follow = the river / followed the river down the valley | the smoke from a chimney / walked toward the smoke
    | the north star / walked toward the brightest star | {his} own footprints / followed the footprints back
    | the church bell / walked toward the sound of the bell

{intro} {time}, {name} and {friend} walked in the forest. They saw {chase} and ran after it, [left and right|over
logs and stones|deeper and deeper]. When they stopped, all the trees looked the same. They were lost.

"I want to go home," said {friend}, and {fhis} lip [shook|trembled]. [||The sun was low, and [the wind was cold|the
shadows grew long].] {name} was [scared|afraid] too, but {he} held the hand of {friend}. "My {helper} told me what
to do," {he} said. "Stay calm, and look for a sign."

[||They sat on a log and [listened|looked around].] Then {name} noticed {sign}. "That way!" {he} said. They
{follow}. They [sang to be brave|did not let go|walked for a long time], and at last they saw [the lights of home|a
window with a candle|the garden gate].

{His} {helper} [ran out to meet them|stood at the door]. "I was so worried!" {hhe} said and hugged them both. They
ate hot [soup|bread|porridge] by the fire. "Next time we will [stay on the path|tell you where we go]," said {name}.
{friend} nodded and [fell asleep on the rug|asked for more]. {end}
'''


def generate_stories(count: int = 20_000, seed: int = 0) -> Iterator[str]:
    """Yield `count` distinct stories, their paragraphs separated by an empty line."""
    (common, _), *plots = _parse(GRAMMAR)
    rng, seen = random.Random(seed), set()
    while len(seen) < count:
        slots, text = _pick(rng, plots)
        story = _story({**common, **slots}, text, rng)
        if story not in seen:
            seen.add(story)
            yield story


def _parse(grammar: str) -> list[tuple[dict[str, list[str]], str]]:
    """Split the grammar into sections of (slots with their values, text)."""
    sections = []
    for section in grammar.split("\n== ")[1:]:
        head, *paragraphs = section.strip().split("\n\n")
        lines = re.sub(r"\n +", " ", head).split("\n")[1:]
        slots = {names: values.split(" | ") for names, values in (line.split(" = ") for line in lines)}
        sections.append((slots, "\n\n".join(" ".join(p.split()) for p in paragraphs)))
    return sections


def _story(choices: dict[str, list[str]], text: str, rng: random.Random) -> str:
    slots = _people(rng)
    for names, values in choices.items():
        slots.update(zip(names.split(" / "), _pick(rng, values).split(" / ")))
    slots.update(hhim="him" if slots["hhe"] == "he" else "her", hhis="his" if slots["hhe"] == "he" else "her")
    while "[" in text or "{" in text:                   # the innermost first, until nothing is open
        text = re.sub(r"\[([^\[\]]*)\]", lambda match: _pick(rng, match[1].split("|")), text)
        text = re.sub(r"\{(\w+)\}", lambda match: slots[match[1]], text)
    text = re.sub(r" +(?=\s|$)|(?<=\n) +", "", text)     # what an empty choice leaves behind
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _people(rng: random.Random) -> "_Slots":
    """A hero and a friend with different names, and the words that point at them."""
    slots = _Slots()
    for prefix, label in (("", "name"), ("f", "friend")):
        name, kind, she = _person(rng)
        while name == slots.get("name"):
            name, kind, she = _person(rng)
        slots.update({label: name, prefix + "kind": kind})
        for pair in ("he she", "him her", "his her", "himself herself"):
            slots[prefix + pair.split()[0]] = pair.split()[she]
    return slots


def _person(rng: random.Random) -> tuple[str, str, bool]:
    she = rng.random() < 0.5
    if rng.random() < 0.3:
        kind = _pick(rng, list(ANIMALS))
        return ANIMALS[kind][she], kind, she
    return _pick(rng, GIRLS if she else BOYS), "girl" if she else "boy", she


class _Slots(dict):
    """Slot values by name; a name with a capital letter gives the value with a capital letter."""

    def __missing__(self, name: str) -> str:
        if name == name.lower():
            raise KeyError(f"the grammar has no slot {name!r}")
        value = self[name.lower()]
        return value[:1].upper() + value[1:]


def _pick(rng: random.Random, options: list[Any]) -> Any:
    """Like `rng.choice`, from `random()` alone: the one stream that Python promises to keep."""
    return options[int(rng.random() * len(options))]


if __name__ == "__main__":
    print("\n\n---\n\n".join(generate_stories(3)))
