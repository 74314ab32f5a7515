"""Words that the pictures show: a list to train on, a list that is only ever used for scoring, and the model's own words."""

from __future__ import annotations

WORDS = """
about above actor adult after again agent album alert alien allow alone alpha amber angel anger ankle apart apple april
arena argue armor arrow aspen atlas audio august award bacon badge baker bamboo banana band bank barn basket battle beach
beacon beam bear beauty bed before begin bench berry beta better bike bird bison black blank blaze block bloom board boat
body bone book boost border bottle bottom bounce bow box brain brave bread break breeze brick bridge bright bring broken
brush bubble bucket budget build bullet bunny burger bus butter button cabin cable cactus cake camel camera camp canal
candle candy canoe canvas captain car carbon card cargo carpet carrot castle cat catch cedar cell chain chair chalk change
charge cheese cherry chess chief chin choice church cinema city clay clean clever cliff climb clock closed cloud clover
club coach coast cobra cocoa code coffee coin cold comet common cook copper coral corner cotton couch count country cow
crane cream create crisp crown cruise crystal cup curve custom cycle daily dairy dance danger dawn deal dear deep deer
delta denim desert design dialog diet dinner disco dish dive doctor dog dollar domain donut double down draft dragon dream
dress drift drink drive drum duck dune dust eagle early earth east easy echo eclipse edge effort egg eight elbow electric
elm ember empty energy engine enjoy enough enter equal escape event every exam exit expert extra fabric face factor fair
family farm fast father feather fence fern ferry fever field fifty film final finger fire first fish five flag flame flash
fleet flight float floor flour flow fluid flute fly focus fog folder food forest fork fort forty found four fox frame free
fresh friend frog frost fruit fuel full funny future galaxy game garage garden garlic gate gentle ghost giant gift giraffe
glad glass globe glove goal goat gold golf good grain grape grass gravel great ground group guard guest guide guitar habit
hair half hammer hand happy harbor hat hawk hazel head health heavy hello help herb hero hidden high hill history hobby
home honey hope horse hotel hour house hub humor hungry hunt ice icon idea igloo image impact index ink input insect iron
island ivory ivy jacket jaguar jam jazz jelly jewel job join joke journal judge juice july jump june jungle junior keep
kernel kettle key kid kind king kiosk kitchen kite kiwi knee knife knight koala label lace ladder lady lake lamp land laser
late laugh lava law lawn layer leader leaf learn leather left legal lemon lens letter level light lily lime limit linen
lion list little live lizard lobby local lock logic london long loop lotus loud love lucky lunar lunch machine magic
magnet mail main major maker mango maple marble march market mask master match matrix maze meadow meal medal media melody
melon member memory menu mercury metal meter middle might milk mind mint minute mirror mobile model modern money monkey
month more morning moss mother motor mouse movie much muffin museum music name nation native nature navy near neck needle
nest never new next nice night nine noble noise noodle north nose note novel nurse oak oasis ocean office olive onion only
open opera option orbit orchid order organ other otter outer oven over owl oxygen oyster pack page paint pair palace palm
panda panel paper parade parcel park party pasta path pause peace peach peak pear pearl pencil penny people pepper perfect
phone photo piano picnic piece pilot pine pixel pizza place plain planet plant plate play plaza plum pocket poem point
polar police polo pond pony pool popcorn poppy port post potato pound power press price prince prize proof proud public
pulse puma pump puppy purse puzzle quack quart queen quest quick quiet quilt quiz rabbit race radar radio rain ranch range
rapid raven razor ready real record reef relax report rescue result ribbon rice ride right ring river road robin robot
rock rocket roof room root rope rose round route royal ruby rule runner sad saddle safe sail salad sale salmon salt sand
satin sauce save scale school score scout screen sea season second secret seed series seven shade shadow shape shark sheep
shelf shell shine ship shoe shop shore short show shy side signal silk silver simple singer six skate sketch ski skill sky
sleep slice slow smart smile smoke snack snake snow soap soccer social sofa soft soil solar solid song soon sound soup south
space spark speed spice spider spirit spoon sport spring spy squad stable stadium stage stamp start state station steam
steel stem step stick stone stop store storm story stove street string strong student studio style sugar suit summer sun
sunset super surf swan sweet swim swing switch system table taco talent tango tank target taste taxi tea teacher team
temple ten tennis tent test thank theme there thing think third three thumb thunder ticket tide tiger timber time tiny
titan toast today token tomato topic torch total touch tower toy track trade traffic trail train travel treat tree trend
trick trip trophy truck true trust tulip tuna tunnel turbo turkey turtle twelve twin two type uncle under union unit upper
urban user valley value vanilla vector velvet venue verb vest video view village violin virus visa vision visit vital
vivid voice volcano vote voyage wagon waiter walk wall walnut want warm wash watch water wave wax way wealth weather web
week west whale wheat wheel where whisper wide wild willow wind window wine wing winner winter wise wolf wonder wood wool
word work world worth wrist write yacht yard year yes yoga young youth zebra zero zone zoo
""".split()

HELD_OUT_WORDS = """
absent acorn admiral anchor answer autumn avocado balloon barrel beetle biscuit blanket blossom bottom brother cabbage
candid capital cargo ceiling century channel charm chimney citrus climate cobalt compass concert cousin cradle cricket
curtain dolphin drawer eleven emerald engine evening falcon fiction flamingo fossil fountain freedom gallery ginger glacier
grocery halo harvest helmet hiking horizon icicle insight jasmine jigsaw journey keyboard kingdom lantern lawyer lecture
leopard library lobster magenta meadows mixture monarch mustard napkin nickel notebook number object orchard outfit pajamas
parrot peanut penguin pigeon planner plastic pottery powder printer pumpkin quality rainbow reason recipe region riddle
rhythm sandal saturn science scooter seventy shampoo sibling sisters skyline slipper spinach sponge squirrel stomach subject
sunrise surgeon tablet teapot theater thirty tornado trumpet umbrella unicorn vacuum vintage walrus weekend whistle yogurt
""".split()
HELD_OUT_WORDS = [w for w in HELD_OUT_WORDS if w not in set(WORDS) and 3 <= len(w) <= 8]

GRAMMAR_WORDS = """
red orange yellow green blue purple pink brown black white gray circle square triangle star heart diamond cross moon small
medium large one two three four five six yes no none image picture left right top bottom center objects count color shape
text first second both neither the there what how hello answer word number
""".split()
